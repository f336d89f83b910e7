"""The static decoder against the other ways of sampling; on a CPU, with a stand-in for CUDA graphs.

Buckets of 4 and 8 positions, below a block of 16, make every text cross them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gpt_model
from gpt_model import GPT, sample_token
from tests.conftest import tiny_model
from utils import decoding
from utils.cpu_matmul import FastLinear, use_fast_linear
from utils.decoding import StaticDecoder, graph_pays

SAMPLINGS = [
    dict(temperature=0),
    dict(),
    dict(temperature=0.7, top_k=20),
    dict(top_p=0.8),
    dict(temperature=1.3, top_k=50, top_p=0.9, vocab_size=90),
]

# Operations that wait for the device, and which a CUDA graph cannot record; named as in inference mode.
READING = {"aten._local_scalar_dense", "aten.is_nonzero", "aten.item", "aten.multinomial", "aten.nonzero"}


class Operations(TorchDispatchMode):
    """Records the operations on tensors; `replay` repeats them on the same tensors, as a CUDA graph would."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @property
    def names(self) -> list[str]:
        """What was called, without overloads: "aten.mm"."""
        return [str(func.overloadpacket) for func, *_ in self.calls]

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # else a view, or in place
                    old.copy_(new)


class Recorder:
    """A `capture` that warms up, records the step and replays the record: Python runs a step just twice."""

    def __init__(self):
        self.graphs: list[Operations] = []
        self.num_replays = 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        with Operations() as graph:
            step()
        self.graphs.append(graph)

        def replay() -> None:
            self.num_replays += 1
            graph.replay()

        return replay


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    """Makes `GPT.stream` decode with recorded steps, with small buckets, and returns the recorder."""
    recorder = Recorder()

    def decoder(model: GPT, batch_size: int, length: int) -> StaticDecoder:
        return StaticDecoder(model, batch_size, length, recorder)

    monkeypatch.setattr(decoding, "BUCKETS", (4, 8, 32))
    monkeypatch.setattr(gpt_model, "graph_pays", lambda device, max_new_tokens: True)
    monkeypatch.setattr(gpt_model, "StaticDecoder", decoder)
    return recorder


def eager_tokens(model: GPT, prompt: Tensor, max_new_tokens: int, **sampling) -> Tensor:
    """What `GPT.generate` returns without the static decoder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt_model, "graph_pays", graph_pays)
        return model.generate(prompt, max_new_tokens, **sampling)


@pytest.mark.parametrize("prompt_length", [1, 5, 16, 40])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_static_cached_and_uncached_sampling_give_the_same_tokens(recorder, sampling, prompt_length):
    """With the same generator, for several texts, any prompt, and across the ends of three blocks."""
    model = tiny_model()
    prompt = torch.randint(0, 90, (3, prompt_length))
    options = [dict(generator=torch.Generator().manual_seed(1), **sampling) for _ in range(3)]
    tokens = model.generate(prompt, 40, **options[0])
    assert tokens.shape == (3, prompt_length + 40) and recorder.num_replays > 30
    assert torch.equal(tokens, eager_tokens(model, prompt, 40, **options[1]))
    assert torch.equal(tokens, eager_tokens(model, prompt, 40, use_cache=False, **options[2]))
    states = [each["generator"].get_state() for each in options]
    assert torch.equal(states[0], states[1])


def test_logits_of_recorded_steps_equal_those_of_one_pass(recorder):
    """At every position, whatever the buckets, up to the rounding of float32."""
    model = tiny_model()
    idx = torch.randint(0, 97, (2, 16))
    decoder = StaticDecoder(model, 2, 16, recorder)
    with torch.inference_mode():
        expected, _ = model(idx)
        decoder.prefill(idx[:, :3])
        for t in range(3, 16):
            assert torch.allclose(decoder.logits, expected[:, t - 1], atol=1e-5)
            decoder.step(idx[:, t : t + 1], t)
        assert torch.allclose(decoder.logits, expected[:, 15], atol=1e-5)


def test_each_bucket_is_captured_once(recorder):
    """Also if the block fills up several times; steps read no more positions than their bucket has."""
    model = tiny_model()
    model.generate(torch.zeros(1, 1, dtype=torch.long), 60)
    assert len(recorder.graphs) == 3  # 4, 8 and 16 positions
    for graph, bucket in zip(recorder.graphs, (4, 8, 16)):
        shapes = [args[1].shape for func, args, *_ in graph.calls if "attention" in str(func)]
        assert shapes == 2 * [(1, 2, bucket, 16)]  # keys of 2 layers
    assert recorder.num_replays == 60 - 1 - 5  # less the first prefill and those of five full blocks


def test_short_texts_get_a_short_cache():
    """The smallest bucket that holds the text; the block size, if that is less."""
    model = tiny_model(block_size=300)
    lengths = (1, 128, 129, 256, 257, 300)
    sizes = [StaticDecoder(model, 1, length).buffer.size(4) for length in lengths]
    assert sizes == [128, 128, 256, 256, 300, 300]
    assert StaticDecoder(tiny_model(), 1, 5).buffer.size(4) == 16


def test_one_synchronisation_for_each_token_after_the_next_step_is_queued(recorder):
    """One value is read from a tensor, none within a recorded step, and multinomial, which reads, is avoided.

    A token's check comes after the embedding of that token, so that on CUDA the device computes meanwhile.
    """
    model = tiny_model()
    prompt = torch.zeros(2, 3, dtype=torch.long)
    with Operations() as outside:
        tokens = model.stream(prompt, 30, top_k=20, top_p=0.9, generator=torch.Generator().manual_seed(0))
        for _ in range(7):
            next(tokens)
    reads = [i for i, name in enumerate(outside.names) if name in READING]
    assert [outside.names[i] for i in reads] == 7 * ["aten.is_nonzero"]
    assert all(outside.names[:i].count("aten.embedding") >= 2 * (n + 2) for n, i in enumerate(reads))
    for graph in recorder.graphs:
        assert not READING & set(graph.names)


@pytest.mark.parametrize("use_static", [True, False])
def test_non_finite_logits_are_an_error_at_their_token(recorder, use_static, monkeypatch):
    """Tokens before it are handed out; the first one sampled from such logits is not."""
    if not use_static:
        monkeypatch.setattr(gpt_model, "graph_pays", graph_pays)
    model, tokens = tiny_model(), []
    with torch.no_grad():
        model.transformer.wpe.weight[9] = float("nan")
    with pytest.raises(FloatingPointError, match="non-finite logits"):
        for token in model.stream(torch.zeros(2, 3, dtype=torch.long), 30):
            tokens.append(token)
    assert len(tokens) == 7  # sampled at positions 2 to 8
    assert (recorder.num_replays > 0) == use_static


def test_non_finite_logits_of_padding_are_ignored(recorder):
    """As in eager sampling: ids from vocab_size on are cut off before the check."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[95] = float("inf")
    prompt = torch.zeros(1, 2, dtype=torch.long)
    tokens = model.generate(prompt, 20, temperature=0, vocab_size=90)
    assert torch.equal(tokens, eager_tokens(model, prompt, 20, temperature=0, vocab_size=90))
    with pytest.raises(FloatingPointError):
        model.generate(prompt, 20, temperature=0)


def test_under_autocast_the_weights_are_cast_once(recorder):
    """Tokens are those of a model converted to bf16; the model and the caller's autocast stay as they are."""
    model = tiny_model()
    prompt = torch.zeros(2, 3, dtype=torch.long)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    in_model = []  # whether autocast was on there
    model.lm_head.register_forward_pre_hook(lambda *_: in_model.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stream = model.stream(prompt, 20, temperature=0)
        tokens = [next(stream)]
        assert torch.is_autocast_enabled("cpu")
        tokens += stream
    assert in_model and not any(in_model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])
    assert not {"aten.to", "aten._to_copy"} & set(recorder.graphs[0].names)  # no cast in a step
    half = tiny_model().to(torch.bfloat16)
    assert torch.equal(torch.cat([prompt, *tokens], dim=1), half.generate(prompt, 20, temperature=0))
    use_fast_linear(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        copied = StaticDecoder(model, 1, 16).model
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.bfloat16}
    assert copied.lm_head.weight is copied.transformer.wte.weight and type(copied.lm_head) is FastLinear
    assert StaticDecoder(model, 1, 16).model is model


def test_the_fast_layers_of_a_cpu_give_the_same_tokens(recorder):
    """Their matmuls are other operations, which a record holds as well."""
    model = tiny_model()
    use_fast_linear(model)
    prompt = torch.randint(0, 97, (2, 5))
    tokens = model.generate(prompt, 40, temperature=0)
    assert torch.equal(tokens, eager_tokens(model, prompt, 40, temperature=0))


def test_graphs_are_used_where_they_pay(monkeypatch):
    """On CUDA, from 64 tokens on; not with deterministic algorithms, and never without a cache."""
    cuda = torch.device("cuda")
    assert graph_pays(cuda, 64) and not graph_pays(cuda, 63)
    assert not graph_pays(torch.device("cpu"), 512) and not graph_pays(torch.device("mps"), 512)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not graph_pays(cuda, 512)
    monkeypatch.setattr(gpt_model, "graph_pays", lambda device, max_new_tokens: True)
    monkeypatch.setattr(gpt_model, "StaticDecoder", None)
    tiny_model().generate(torch.zeros(1, 1, dtype=torch.long), 20, use_cache=False)


def test_a_step_is_run_on_the_side_stream_before_it_is_captured_there(monkeypatch):
    """In the order that CUDA needs: each stream waits for the other, and no other thread is restricted."""
    log = []

    def context(name: str, *_: object, **options: object) -> contextlib.AbstractContextManager:
        log.append((name, *options.values()))
        return contextlib.nullcontext()

    side, current = (
        SimpleNamespace(wait_stream=lambda other, name=name: log.append(f"{name} waits"))
        for name in ("side", "current")
    )
    graph = SimpleNamespace(replay=lambda: log.append("replay"))
    monkeypatch.setattr(decoding, "capture_stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: context("stream"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: context("graph", **options))
    decoding.capture_cuda_graph(torch.device("cuda", 1), lambda: log.append("step"))()
    warm_up = ["side waits", ("stream",), "step", "current waits"]
    assert log == [*warm_up, ("graph", side, "thread_local"), "step", "replay"]


def test_the_draw_is_that_of_multinomial():
    """The same ids and the same state of the generator afterwards."""
    for seed in range(20):
        logits = 3 * torch.randn(4, 97, generator=torch.Generator().manual_seed(seed))
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        expected = torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generators[0])
        assert torch.equal(sample_token(logits, generator=generators[1]), expected)
        assert torch.equal(*(generator.get_state() for generator in generators))
