"""The model compared with arithmetic, a hand-written softmax, and transformers."""

from __future__ import annotations

import math
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

from gpt_model import GPT, PRETRAINED_CONFIGS, GPTConfig, KeyValueCache, sample_token
from tests.conftest import tiny_config, tiny_model
from utils.command_line import UserError
from utils.tokenizer import CharTokenizer, GPT2Tokenizer
from utils.weights.checkpoint import model_content, save_pair


@pytest.mark.parametrize(("vocab_size", "expected"), [(50257, 124_439_808), (50304, 124_475_904)])
def test_parameter_counts_are_those_of_gpt2(vocab_size, expected):
    """GPT-2 124M has the published number of parameters, and padding adds 47 rows."""
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=vocab_size))
    assert model.num_parameters() == expected


def test_released_sizes_have_the_published_parameter_counts():
    """The table of sizes describes OpenAI's four models."""
    published = {"gpt2": 124439808, "gpt2-medium": 354823168, "gpt2-large": 774030080, "gpt2-xl": 1557611200}
    for name, sizes in PRETRAINED_CONFIGS.items():
        with torch.device("meta"):
            assert GPT(GPTConfig(**sizes)).num_parameters() == published[name]


def test_embedding_and_head_are_one_tensor():
    """The weights remain tied after loading a state dict and changing the dtype."""
    model = tiny_model()
    model.load_state_dict(GPT(tiny_config()).state_dict())
    model = model.to(torch.float64)
    assert model.transformer.wte.weight is model.lm_head.weight


def test_every_initial_standard_deviation():
    """Weights start at 0.02, residual projections at 0.02 / sqrt(2 L), biases at 0, norms at 1 and 0."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=256, vocab_size=2048, n_layer=8, n_head=4, n_embd=256)
    for name, parameter in GPT(config).named_parameters():
        if "ln_" in name:
            assert torch.all(parameter == (1.0 if name.endswith("weight") else 0.0)), name
        elif name.endswith("bias"):
            assert torch.all(parameter == 0), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            # The standard error of a standard deviation of n samples is std / sqrt(2 n): allow five.
            assert abs(parameter.std().item() - std) < 5 * std / math.sqrt(2 * parameter.numel()), name
            assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name


def test_no_position_sees_the_future():
    """The gradient of a position's logits is zero for later inputs and non-zero for earlier ones."""
    model = tiny_model()
    idx = torch.randint(0, 97, (1, 16))
    inputs = []
    model.transformer.wte.register_forward_hook(lambda m, i, out: (inputs.append(out), out.retain_grad())[1])
    logits, _ = model(idx)
    logits[0, 7].sum().backward()
    per_position = inputs[0].grad[0].abs().sum(dim=1)
    assert torch.all(per_position[:8] > 0)
    assert torch.all(per_position[8:] == 0)


def test_attention_equals_a_softmax_written_by_hand():
    """The attention layer computes softmax(q k^T / sqrt(D)) v over earlier positions, head by head."""
    model = tiny_model()
    attention = model.transformer.h[0].attn
    B, T, C, H = 2, 9, 32, 2
    x = torch.randn(B, T, C)
    q, k, v = attention.c_attn(x).split(C, dim=2)
    expected = torch.zeros(B, T, C)
    for b in range(B):
        for h in range(H):
            head = slice(h * C // H, (h + 1) * C // H)
            for t in range(T):
                scores = q[b, t, head] @ k[b, : t + 1, head].T / math.sqrt(C // H)
                expected[b, t, head] = torch.softmax(scores, dim=0) @ v[b, : t + 1, head]
    assert torch.allclose(attention(x), attention.c_proj(expected), atol=1e-5)


def test_first_loss_is_that_of_a_uniform_guess():
    """The loss of an untrained model is ln V."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=50304, n_layer=2, n_head=2, n_embd=32))
    idx = torch.randint(0, 50257, (4, 33))
    _, loss = model(idx[:, :-1], idx[:, 1:], return_logits=False)
    assert abs(loss.item() - math.log(50304)) < 0.1


def test_forward_returns_logits_and_loss_as_documented():
    """Logits of all positions, a loss only with targets, and with return_logits=False that loss alone."""
    model = tiny_model()
    idx, targets = torch.randint(0, 97, (2, 3, 16))
    logits, loss = model(idx)
    assert logits.shape == (3, 16, 97) and loss is None
    logits, loss = model(idx, targets)
    assert torch.allclose(loss, F.cross_entropy(logits.view(-1, 97), targets.view(-1)))
    nothing, same_loss = model(idx, targets, return_logits=False)
    assert nothing is None
    assert abs(same_loss.item() - loss.item()) < 1e-5


@pytest.mark.parametrize(
    "sizes", [dict(n_embd=33), dict(n_layer=0), dict(vocab_size=-1), dict(block_size=1.5), dict(n_head="2")]
)
def test_an_impossible_config_is_refused(sizes):
    """GPTConfig checks its sizes when it is created."""
    with pytest.raises(UserError):
        tiny_config(**sizes)


def test_too_many_tokens_are_refused():
    """More tokens than the block size are an error with both numbers, not an index error."""
    with pytest.raises(UserError, match="17 tokens do not fit the block size of 16"):
        tiny_model()(torch.zeros(1, 17, dtype=torch.long))


def test_every_parameter_is_in_exactly_one_optimizer_group():
    """Matrices decay, vectors do not; none is missing or listed twice."""
    model = tiny_model()
    optimizer = model.configure_optimizers(0.1, 1e-3, "cpu", is_master_process=False)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    for group in optimizer.param_groups:
        assert all((p.dim() >= 2) == (group["weight_decay"] > 0) for p in group["params"])
        assert group["betas"] == (0.9, 0.95) and group["eps"] == 1e-8


def save_random_gpt2(folder, **changes):
    """Writes a small random GPT2LMHeadModel with save_pretrained and returns it."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(n_positions=32, vocab_size=101, n_layer=3, n_head=4, n_embd=48)
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs


def test_logits_and_loss_equal_those_of_transformers(tmp_path):
    """Weights of a random GPT2LMHeadModel, read by from_pretrained, give its logits and its loss to 1e-5."""
    theirs = save_random_gpt2(tmp_path)
    ours = GPT.from_pretrained(tmp_path).eval()
    idx = torch.randint(0, 101, (2, 32))
    with torch.no_grad():
        expected = theirs(idx, labels=idx)
        logits, loss = ours(idx[:, :-1], idx[:, 1:])
        assert (logits - expected.logits[:, :-1]).abs().max() < 1e-5
        assert abs(loss.item() - expected.loss.item()) < 1e-5


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(activation_function="relu"), "activation_function='relu'"),
        (dict(tie_word_embeddings=False), "tie_word_embeddings=False"),
        (dict(add_cross_attention=True), "add_cross_attention=True"),
    ],
)
def test_a_variant_of_gpt2_is_refused(tmp_path, option, message):
    """Options of transformers that compute another function are an error."""
    save_random_gpt2(tmp_path, **option)
    with pytest.raises(UserError, match=message):
        GPT.from_pretrained(tmp_path)


def test_another_kind_of_model_is_named(tmp_path):
    """The error names the model type, not the weights, which differ too."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model_type='llama'"):
        GPT.from_pretrained(tmp_path)


def add_weights(folder, **added):
    """Adds tensors to a folder that save_random_gpt2 wrote; `__` in a name stands for a dot."""
    safetensors = pytest.importorskip("safetensors.torch")
    path = folder / "model.safetensors"
    named = {name.replace("__", "."): tensor for name, tensor in added.items()}
    safetensors.save_file({**safetensors.load_file(path), **named}, path, metadata={"format": "pt"})


def test_an_additional_head_is_ignored(tmp_path):
    """Such as the value head that reinforcement learning adds."""
    theirs = save_random_gpt2(tmp_path)
    add_weights(tmp_path, v_head__summary__weight=torch.randn(1, 48))
    assert GPT.from_pretrained(tmp_path).transformer.wte.weight.equal(theirs.transformer.wte.weight)


def test_an_untied_output_projection_is_refused(tmp_path):
    """If the file holds one that differs from the embedding, although config.json says they are tied."""
    theirs = save_random_gpt2(tmp_path)
    add_weights(tmp_path, lm_head__weight=torch.randn(101, 48))
    loaded = type(theirs).from_pretrained(tmp_path)
    if loaded.lm_head.weight.equal(loaded.transformer.wte.weight):
        pytest.skip("this version of transformers ties the two, as config.json says")
    with pytest.raises(UserError, match="lm_head and wte differ"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: None if ".h.1." in name else name, "12 differ .missing transformer.h.1"),
        (lambda name: f"_orig_mod.{name}", r"missing (transformer\.)?h\.0"),
    ],
)
def test_a_folder_without_all_its_weights_is_refused(tmp_path, rename, message):
    """transformers initialises missing weights at random; here they are an error."""
    safetensors = pytest.importorskip("safetensors.torch")
    save_random_gpt2(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {rename(name): tensor for name, tensor in safetensors.load_file(path).items()}
    weights.pop(None, None)
    safetensors.save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("size", "other", "message"),
    [
        ('"vocab_size": 101', '"vocab_size": 102', "1 differ .mismatched.*wte.weight"),
        ('"n_layer": 3', '"n_layer": 2', "differ .unexpected transformer.h.2"),
    ],
)
def test_a_folder_of_another_size_is_refused(tmp_path, size, other, message):
    """A config.json with another vocabulary size than the weights, or with fewer layers."""
    save_random_gpt2(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace(size, other))
    with pytest.raises(UserError, match=message):
        GPT.from_pretrained(tmp_path)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:248d\nsize 548105171\n"


@pytest.mark.parametrize("damage", [lambda data: data[:-1000], lambda data: LFS_POINTER, lambda data: b""])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_weights_are_an_error(tmp_path, name, damage):
    """Truncated files and git-lfs pointers, in both formats; no message suggests weights_only=False."""
    theirs = save_random_gpt2(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    if name.endswith(".bin"):
        (tmp_path / "model.safetensors").unlink()
        GPT.from_pretrained(tmp_path)  # undamaged, it loads
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(UserError, match="cannot load") as caught:
        GPT.from_pretrained(tmp_path)
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_loaded_model_is_in_eval_mode(tmp_path):
    """From a checkpoint and from a folder, by each of the methods; a new one is in training mode."""
    model = GPT(tiny_config()).train()
    path = save_pair(tmp_path, 1, model_content(model, vars(model.config), 1, None, {"name": "gpt2"}), {})
    loaded = [GPT.load(path), GPT.from_checkpoint(path)]
    if find_spec("transformers"):
        save_random_gpt2(tmp_path / "folder")
        loaded += [GPT.load(tmp_path / "folder"), GPT.from_pretrained(tmp_path / "folder")]
    assert model.training and not any(module.training for each in loaded for module in each.modules())


def test_ids_of_a_tokenizer_are_the_input_of_a_model():
    """Without a cast."""
    for tokenizer in (GPT2Tokenizer(), CharTokenizer(" Hdelorw")):
        ids = torch.from_numpy(tokenizer.encode("Hello world"))
        logits, loss = tiny_model(vocab_size=50304)(ids[None, :-1], ids[None, 1:])
        assert logits.shape == (1, len(ids) - 1, 50304) and loss.isfinite()


def test_an_unknown_name_lists_the_four_before_transformers_is_imported():
    """A misspelled name costs no import and no download."""
    import sys

    before = "transformers" in sys.modules
    for load in (GPT.from_pretrained, GPT.load):
        with pytest.raises(UserError, match="gpt2, gpt2-medium, gpt2-large, gpt2-xl"):
            load("gpt2-larg")
    assert ("transformers" in sys.modules) == before


@pytest.mark.parametrize("max_new_tokens", [10, 40])
def test_sampling_with_and_without_cache_gives_the_same_tokens(max_new_tokens):
    """Up to the block size, and beyond it, where both keep the last half of the block."""
    model = tiny_model()
    prompt = torch.randint(0, 97, (2, 5))
    runs = [
        model.generate(
            prompt, max_new_tokens, top_k=20, generator=torch.Generator().manual_seed(1), use_cache=cache
        )
        for cache in (True, False)
    ]
    assert torch.equal(*runs)
    assert runs[0].shape == (2, 5 + max_new_tokens)
    assert torch.equal(runs[0][:, :5], prompt)


def test_cached_hidden_states_equal_those_of_one_pass():
    """Prefill and single steps give the hidden states that one pass over all positions does."""
    model = tiny_model()
    idx = torch.randint(0, 97, (2, 12))
    whole = model.hidden_states(idx)
    cache = KeyValueCache(model.config, 2, 12, model.lm_head.weight)
    parts = [model.hidden_states(idx[:, :7], cache=cache)]
    parts += [model.hidden_states(idx[:, t : t + 1], cache=cache) for t in range(7, 12)]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)


def test_temperature_zero_is_greedy_decoding():
    """Every token is the argmax of the logits, without a generator."""
    model = tiny_model()
    prompt = torch.randint(0, 97, (1, 4))
    expected = prompt
    for _ in range(5):
        expected = torch.cat((expected, model(expected)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(prompt, 5, temperature=0.0), expected)


def test_padding_of_the_vocabulary_is_never_sampled():
    """Ids from vocab_size on are not sampled even if their logits are the largest."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[90:] *= 100
    tokens = model.generate(torch.zeros(8, 1, dtype=torch.long), 30, temperature=2.0, vocab_size=90)
    assert tokens.max() < 90


def test_top_k_and_top_p_keep_the_likeliest():
    """Only the k likeliest tokens, or the fewest that reach p, are sampled, and each of them is."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(2000, 1)
    generator = torch.Generator().manual_seed(0)
    assert set(sample_token(logits, top_k=2, generator=generator).flatten().tolist()) == {0, 1}
    assert set(sample_token(logits, top_p=0.8, generator=generator).flatten().tolist()) == {0, 1}
    assert set(sample_token(logits, top_p=0.81, generator=generator).flatten().tolist()) == {0, 1, 2}
    assert set(sample_token(logits, generator=generator).flatten().tolist()) == {0, 1, 2, 3}
    share = (sample_token(logits, temperature=1.0, generator=generator) == 0).float().mean().item()
    assert abs(share - 0.5) < 5 * math.sqrt(0.25 / 2000)


def test_sampling_from_non_finite_logits_is_an_error():
    """FloatingPointError, not PyTorch's message about probabilities."""
    with pytest.raises(FloatingPointError, match="non-finite"):
        sample_token(torch.tensor([[1.0, float("nan")]]))


def test_generating_leaves_the_global_random_state_untouched():
    """With a generator of its own, so that samples during a training run do not change the run."""
    model = tiny_model()
    before = torch.get_rng_state()
    model.generate(torch.zeros(1, 1, dtype=torch.long), 3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_works_under_autocast_and_at_tiny_temperatures():
    """The cache returns the dtype that autocast computes in; a temperature near zero is greedy."""
    model = tiny_model()
    prompt = torch.randint(0, 97, (1, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.generate(prompt, 4).shape == (1, 8)
    greedy = model.generate(prompt, 6, temperature=0.0)
    assert torch.equal(model.generate(prompt, 6, temperature=1e-39), greedy)
