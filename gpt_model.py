"""GPT-2 from scratch: a decoder-only Transformer, and nothing but the model.

Parameter names are those of the released checkpoints, so OpenAI's weights need only be transposed.
Sources: Vaswani et al. 2017 (attention), Radford et al. 2019 (GPT-2), Brown et al. 2020 (GPT-3: optimizer).

Shapes: B batch, T time (tokens), C channels (n_embd), H heads, D head size (C / H), L layers, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from utils.command_line import UserError
from utils.console import say
from utils.decoding import StaticDecoder, check_sampling, graph_pays
from utils.fused_loss import fused_cross_entropy
from utils.tokenizer import GPT2_VOCAB_SIZE
from utils.weights.schema import check_weights, size_problems

PRETRAINED_CONFIGS = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}


@dataclass
class GPTConfig:
    """Sizes and dropout of a GPT-2, by default those of 124M. Raises UserError for impossible values."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = GPT2_VOCAB_SIZE  # 50,000 merges, 256 bytes, <|endoftext|>; training pads it
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # in training (Srivastava et al. 2014); not a size: any value fits the same weights

    def __post_init__(self):
        problems = size_problems({name: value for name, value in asdict(self).items() if name != "dropout"})
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:  # also NaN
            problems.append(f"dropout={self.dropout} is not at least 0 and below 1")
        if problems:
            raise UserError("model: " + "; ".join(problems), "GPT-2 124M has n_layer=12 n_head=12 n_embd=768")


class KeyValueCache:
    """Keys and values of at most `max_length` past positions of all layers, allocated like `like`."""

    def __init__(self, config: GPTConfig, batch_size: int, max_length: int, like: Tensor):
        shape = (config.n_layer, 2, batch_size, config.n_head, max_length, config.n_embd // config.n_head)
        self.buffer = like.new_empty(shape)  # (L, 2, B, H, T, D)
        self.length = 0  # positions filled; the model advances it after all layers have written

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends a layer's new keys and values, each (B, H, T, D), and returns all of them."""
        end = self.length + k.size(2)
        self.buffer[layer, 0, :, :, self.length : end] = k
        self.buffer[layer, 1, :, :, self.length : end] = v
        # Attention needs q, k and v in one dtype, which under autocast is lower than the buffer's.
        return self.buffer[layer, 0, :, :, :end].to(k.dtype), self.buffer[layer, 1, :, :, :end].to(v.dtype)


class CausalSelfAttention(nn.Module):
    """Multi-head attention, (B, T, C) to (B, T, C): a position attends to itself and to earlier ones.

    A `mask` (B, 1, T, T), True where a row may attend to a column, replaces the causal one.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values in one matmul
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.c_proj.NANOGPT_SCALE_INIT = True
        self.config = config
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        (B, T, C), H = x.shape, self.config.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)  # each (B, T, C)
        # Each head attends in its own D = C / H channels: heads become a batch dimension.
        q = q.view(B, T, H, C // H).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, H, C // H).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, H, C // H).transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        # A single position attends to the whole cache. With is_causal it would attend to the first key only:
        # PyTorch aligns that mask to the top left.
        is_causal = mask is None and T > 1
        # softmax(q k^T / sqrt(D)) v, without the (T, T) matrix where FlashAttention (Dao et al. 2022) runs.
        dropout = self.config.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # (B, H, T, D) -> (B, T, C)
        return F.dropout(y, dropout)


class MLP(nn.Module):
    """Position-wise feed-forward network with a hidden size of 4 C: (B, T, C) to (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # GPT-2 was trained with this approximation
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.c_proj.NANOGPT_SCALE_INIT = True
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(self.gelu(self.c_fc(x))), self.config.dropout, self.training)


class Block(nn.Module):
    """Pre-norm block: x + attn(ln_1(x)), then x + mlp(ln_2(x)); (B, T, C) to (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: `model(idx)` returns logits, `model(idx, targets)` also a loss, `generate` new tokens."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.tokenizer_state = {"name": "gpt2"}  # of the tokenizer it was trained with
        self.recompute = False  # True: training takes less memory, and about a third more time
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),  # token embedding
            wpe=nn.Embedding(config.block_size, config.n_embd),  # learned absolute positions
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd),
        ))  # fmt: skip
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Input and output embedding are one tensor (Press & Wolf 2017): 39M of the 124M parameters.
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = 0.02
            if hasattr(module, "NANOGPT_SCALE_INIT"):
                # 2 L projections add to the residual stream: scaled by 1 / sqrt(2 L), their sum keeps the
                # variance of one (GPT-2, section 2.3).
                std *= (2 * self.config.n_layer) ** -0.5
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def hidden_states(
        self, idx: Tensor, positions: Tensor | None = None, attention_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:  # fmt: skip
        """The forward pass up to the output projection: hidden states (B, T, C) after the last layer norm.

        Args:
            idx: (B, T) token ids.
            positions: (B, T) or (T,) position of each token; by default 0..T-1, or those after the cache.
            attention_mask: (B, 1, T, T) True where a row may attend to a column; by default causal.
            cache: keys and values of earlier positions; extended in place. After a filled cache, T must be 1.

        Raises UserError for more tokens than the block size.
        """
        past = cache.length if cache is not None else 0
        T = idx.size(1)
        assert past == 0 or T == 1, "after a filled cache, one token at a time: there is no mask for more"
        if positions is None:
            if past + T > self.config.block_size:
                what = f"{past + T} tokens do not fit the block size of {self.config.block_size}"
                raise UserError(what, "give the model at most block_size tokens at a time")
            positions = torch.arange(past, past + T, device=idx.device)
        # Positions are added, not concatenated: (B, T, C) + (T, C) broadcasts over the batch.
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            if self.recompute and self.training:
                # Keeps x only; the backward pass runs the block again, with equal dropout (Chen et al. 2016).
                x = checkpoint(block, x, attention_mask, use_reentrant=False)
            else:
                x = block(x, attention_mask, cache)
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, return_logits: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Predicts the token after each position.

        Args:
            idx: (B, T) token ids.
            targets: (B, T) ids of the tokens that follow; positions with -100 are ignored.
            return_logits: False, with targets, computes the loss alone, in chunks: the (B, T, V) logits are
                never in memory at once.

        Returns (logits (B, T, V) or None, loss: mean cross-entropy in nats, or None without targets).
        """
        x = self.hidden_states(idx)
        if targets is not None and not return_logits:
            return None, fused_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        logits = self.lm_head(x)  # (B, T, V)
        # In float32 also under autocast: a bf16 loss near 3 has steps of 0.016.
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return logits, loss

    def num_parameters(self, *, count_positions: bool = True) -> int:
        """Number of parameters, the tied embedding once; without position embeddings for FLOP counts."""
        total = sum(p.numel() for p in self.parameters())
        return total if count_positions else total - self.transformer.wpe.weight.numel()

    def flops_per_token(self, T: int) -> int:
        """FLOPs per token, forward and backward: 6 N + 12 L C T (PaLM, Chowdhery et al. 2022, appendix B)."""
        # 2 N FLOPs forward (a multiply and an add per weight), twice that backward; position embeddings are
        # looked up, not multiplied. The second term is attention: q k^T and the sum over values.
        N = self.num_parameters(count_positions=False)
        return 6 * N + 12 * self.config.n_layer * self.config.n_embd * T

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, device_type: str, is_master_process: bool = True,
        leave_out: frozenset[nn.Parameter] = frozenset(),
    ) -> torch.optim.AdamW:  # fmt: skip
        """AdamW (Loshchilov & Hutter 2019) with the betas of GPT-3; only matrices decay.

        Args:
            weight_decay: for parameters with at least two dimensions; biases and layer norms do not decay.
            learning_rate: initial value; the training loop sets it before every update.
            device_type: "cuda", "cpu" or "mps" update all parameters in fused kernels.
            is_master_process: print one line about the parameter groups.
            leave_out: parameters that another optimizer trains.
        """
        trained = [p for p in self.parameters() if p.requires_grad and p not in leave_out]
        decayed, others = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        fused = device_type in ("cuda", "cpu", "mps")
        if is_master_process:
            counts = [f"{sum(p.numel() for p in params):,}" for params in (decayed, others)]
            say(
                f"optimizer: AdamW{' (fused)' if fused else ''}, weight decay {weight_decay:g} on "
                f"{len(decayed)} tensors ({counts[0]} parameters), none on {len(others)} ({counts[1]})"
            )
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=fused)

    @torch.inference_mode()
    def stream(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, generator: torch.Generator | None = None,
        vocab_size: int | None = None, use_cache: bool = True,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Yields the ids (B, 1) of one new token after another; the arguments are those of `generate`."""
        check_sampling(max_new_tokens, temperature, top_k, top_p)
        block_size = self.config.block_size
        context = idx[:, -block_size:]  # (B, T)
        room = min(block_size, context.size(1) + max_new_tokens)
        if use_cache and graph_pays(self.lm_head.weight.device, max_new_tokens):
            sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            sample = partial(sample_token, **sampling, check_finite=False)
            yield from StaticDecoder(self, idx.size(0), room).stream(idx, max_new_tokens, vocab_size, sample)
            return
        cache = KeyValueCache(self.config, idx.size(0), room, self.lm_head.weight) if use_cache else None
        for _ in range(max_new_tokens):
            if context.size(1) > block_size:
                # Positions are absolute, so a full cache cannot slide: the block's last half is recomputed.
                context = context[:, -max(1, block_size // 2) :]
                if cache is not None:
                    cache.length = 0
            unseen = context if cache is None else context[:, cache.length :]  # the prompt, then one token
            logits = self.lm_head(self.hidden_states(unseen, cache=cache)[:, -1]).float()  # (B, V)
            token = sample_token(logits[:, :vocab_size], temperature, top_k, top_p, generator)
            context = torch.cat((context, token), dim=1)
            yield token

    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, generator: torch.Generator | None = None,
        vocab_size: int | None = None, use_cache: bool = True,
    ) -> Tensor:  # fmt: skip
        """Continues prompts, and returns them with their continuations: (B, T + max_new_tokens) token ids.

        Args:
            idx: (B, T) prompts of equal length; only the last block_size tokens are used.
            max_new_tokens: number of tokens to sample.
            temperature: 0 is greedy decoding; below 1 sharpens, above 1 flattens the distribution.
            top_k: sample from the k likeliest tokens only (Fan et al. 2018).
            top_p: of those, from the fewest with a total probability of at least p (Holtzman et al. 2020).
            generator: random number generator on the model's device; the global one is then left untouched.
            vocab_size: of the tokenizer; larger ids are padding and never sampled.
            use_cache: cache keys and values; without it the tokens are the same, only slower.

        Raises UserError for impossible arguments, FloatingPointError for non-finite logits.
        """
        sampling = (temperature, top_k, top_p, generator, vocab_size, use_cache)
        return torch.cat([idx, *self.stream(idx, max_new_tokens, *sampling)], dim=1)

    @classmethod
    def load(cls, source: str | Path, device: str | torch.device = "cpu") -> "GPT":
        """Loads a checkpoint, the last one in a run's folder, a GPT-2 size or a transformers folder.

        Returns it in eval mode. Raises UserError for anything else.
        """
        from utils.weights.find_model import find_model

        found = find_model(source, PRETRAINED_CONFIGS)
        if str(found) in PRETRAINED_CONFIGS or Path(found).is_dir():
            return cls.from_pretrained(found).to(device)
        return cls.from_checkpoint(found, device)

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str | torch.device = "cpu") -> "GPT":
        """Loads a checkpoint of train_gpt.py or nanoGPT. Raises UserError for any other or damaged file."""
        from utils.weights.checkpoint import load_model_file

        saved = load_model_file(path)
        config = GPTConfig(**saved["config"])
        with torch.device("meta"):  # names and shapes are compared before any memory is allocated
            check_weights(path, saved["model"], cls(config).state_dict())
        model = cls(config)
        model.load_state_dict(saved["model"])
        model.tokenizer_state = saved["tokenizer"]
        return model.to(device).eval()

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path) -> "GPT":
        """Loads OpenAI's weights by name, or a transformers folder. Raises UserError if it is not a GPT-2."""
        from utils.weights.pretrained import load_gpt2_weights, tokenizer_state_of

        config, state_dict = load_gpt2_weights(str(name_or_dir), PRETRAINED_CONFIGS)
        model = cls(GPTConfig(**config))
        model.load_state_dict(state_dict)
        model.tokenizer_state = tokenizer_state_of(str(name_or_dir))
        return model.eval()


def sample_token(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
    generator: torch.Generator | None = None, *, check_finite: bool = True,
) -> Tensor:  # fmt: skip
    """Samples one id (B, 1) from each row of logits (B, V). Raises FloatingPointError for non-finite ones.

    The check waits for the device; with `check_finite=False` nothing does.
    """
    if check_finite and not torch.isfinite(logits).all():
        raise FloatingPointError("non-finite logits")
    if temperature < torch.finfo(logits.dtype).tiny:  # 0, or rounded to it: greedy, the limit
        return logits.argmax(dim=-1, keepdim=True)
    # Sorted only as far as needed: sorting the whole vocabulary would dominate the cost.
    top_k = min(top_k or logits.size(-1), logits.size(-1))
    ids = None
    if top_k < logits.size(-1) or top_p is not None:
        logits, ids = logits.topk(top_k, dim=-1)
    # Shifted first, so that division by a tiny temperature yields -inf at worst, never inf - inf.
    probs = F.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    if top_p is not None:
        before = probs.cumsum(dim=-1) - probs  # total of all likelier tokens; 0 for the first, so it stays
        probs = probs.masked_fill(before >= top_p, 0.0)
    # What torch.multinomial computes, except that it waits for the device to check probs. Nothing need be
    # normalised: the largest p / e, with e exponential, is that of an id with probability p / sum(p).
    exponential = torch.empty_like(probs).exponential_(generator=generator)
    choice = (probs / exponential).argmax(dim=-1, keepdim=True)  # (B, 1)
    return choice if ids is None else ids.gather(-1, choice)
