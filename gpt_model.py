"""GPT-2, from scratch: the model and nothing but the model.

Parameter names are those of the released checkpoints, so OpenAI's weights load with nothing but transposes.
Sources: Vaswani et al. 2017 (attention), Radford et al. 2019 (GPT-2), Brown et al. 2020 (GPT-3: optimizer).

Shapes: B batch, T time (tokens), C channels (n_embd), H heads, D head size (C / H), L layers, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Iterator

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from utils.cpu_matmul import Linear
from utils.errors import UserError
from utils.fused_loss import fused_cross_entropy

PRETRAINED_CONFIGS = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}


@dataclass
class GPTConfig:
    """The five numbers that make a GPT-2. Raises UserError for numbers that make none."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50257  # 50,000 merges, 256 bytes, <|endoftext|>; training pads it to 50304 = 393 x 128
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768

    def __post_init__(self):
        problems = [f"{name}={value} is not a positive whole number" for name, value in asdict(self).items()
                    if not isinstance(value, int) or value <= 0]  # fmt: skip
        if not problems and self.n_embd % self.n_head:
            problems.append(f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}")
        if problems:
            raise UserError("model: " + "; ".join(problems), "GPT-2 124M has n_layer=12 n_head=12 n_embd=768")


class KeyValueCache:
    """Keys and values of the positions seen so far, in buffers that are allocated once.

    Args:
        config: of the model.
        batch_size: B.
        max_length: positions that fit.
        like: a tensor of the model's dtype and device.
    """

    def __init__(self, config: GPTConfig, batch_size: int, max_length: int, like: Tensor):
        shape = (config.n_layer, 2, batch_size, config.n_head, max_length, config.n_embd // config.n_head)
        self.buffer = like.new_empty(shape)  # (L, 2, B, H, T, D)
        self.length = 0  # positions filled; the model moves it after all layers have written

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes a layer's new keys and values (B, H, T, D) behind the old ones and returns all of them."""
        end = self.length + k.size(2)
        self.buffer[layer, 0, :, :, self.length : end] = k
        self.buffer[layer, 1, :, :, self.length : end] = v
        # Under autocast keys and values come in a lower dtype than the weights: they leave as they came.
        return self.buffer[layer, 0, :, :, :end].to(k.dtype), self.buffer[layer, 1, :, :, :end].to(v.dtype)


class CausalSelfAttention(nn.Module):
    """Multi-head attention, (B, T, C) to (B, T, C): a position sees itself and what came before it.

    An `attention_mask` (B, 1, T, T), True where a row may see a column, takes the place of the causal one.
    """

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # queries, keys and values at once
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.c_proj.NANOGPT_SCALE_INIT = True
        self.n_head = config.n_head
        self.layer = layer

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
        is_causal = attention_mask is None
        if cache is not None:
            is_causal = is_causal and cache.length == 0  # one new position sees all the others: no mask
            k, v = cache.append(self.layer, k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, is_causal=is_causal)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two layers, four times as wide in between: (B, T, C) to (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # the approximation that GPT-2 was trained with
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.c_proj.NANOGPT_SCALE_INIT = True

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """Attention, where tokens talk to each other, then the MLP, where each thinks alone; both add to x."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), attention_mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2: `model(idx)` gives logits, `model(idx, targets)` a loss too, `model.generate(idx, n)` tokens."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.tokenizer_state = {"name": "gpt2"}  # what the weights read and write, for tokenizer_from_state
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd),
        ))  # fmt: skip
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        # One tensor for reading and writing tokens (Press & Wolf 2017).
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = 0.02
            if hasattr(module, "NANOGPT_SCALE_INIT"):
                # All 2 L additions to the residual stream together have the variance of one (GPT-2, section
                # 2.3).
                std *= (2 * self.config.n_layer) ** -0.5
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def hidden_states(
        self,
        idx: Tensor,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Everything but the output projection.

        Args:
            idx: (B, T) token ids.
            positions: (B, T) or (T,) position of each token; by default 0..T-1, or those that follow the
                cache.
            attention_mask: (B, 1, T, T) True where a row's position may see a column's; by default causal.
            cache: keys and values of the positions before idx; extended. Behind a filled cache, one token at
                a time.

        Returns:
            (B, T, C) normalised hidden states.

        Raises:
            UserError: more tokens than the block size.
        """
        past = cache.length if cache is not None else 0
        T = idx.size(1)
        assert past == 0 or T == 1, "behind a filled cache, one token at a time: there is no mask"
        if past + T > self.config.block_size and positions is None:
            raise UserError(
                f"{past + T} tokens do not fit the block size of {self.config.block_size}",
                "give the model at most block_size tokens at a time",
            )
        if positions is None:
            positions = torch.arange(past, past + T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        for block in self.transformer.h:
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
            targets: (B, T) ids of the tokens that follow; -100 marks positions that do not count.
            return_logits: False, with targets, asks for the loss alone: the (B, T, V) logits then never
                exist.

        Returns:
            (logits (B, T, V) or None, loss: mean cross-entropy in nats, or None without targets).
        """
        x = self.hidden_states(idx)
        if targets is not None and not return_logits:
            return None, fused_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        logits = self.lm_head(x)
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return logits, loss

    def num_parameters(self, count_positions: bool = True) -> int:
        """Number of parameters, the tied embedding once; without the position embedding for FLOP counts."""
        total = sum(p.numel() for p in self.parameters())
        return total if count_positions else total - self.transformer.wpe.weight.numel()

    def flops_per_token(self, T: int) -> int:
        """FLOPs of forward and backward: 6 N + 12 L C T (PaLM, Chowdhery et al. 2022, appendix B)."""
        N = self.num_parameters(count_positions=False)
        return 6 * N + 12 * self.config.n_layer * self.config.n_embd * T

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, device_type: str, is_master_process: bool = True
    ) -> torch.optim.AdamW:
        """AdamW as GPT-3 was trained (betas 0.9 and 0.95): matrices decay, vectors do not.

        Args:
            weight_decay: of the parameters with two dimensions or more.
            learning_rate: to start with; the training loop sets it anew at every step.
            device_type: "cuda", "cpu" or "mps": decides whether the whole update can be one fused kernel.
            is_master_process: prints one line about the groups.
        """
        decayed = [p for p in self.parameters() if p.requires_grad and p.dim() >= 2]
        others = [p for p in self.parameters() if p.requires_grad and p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        fused = fused_adamw_runs_on(device_type)
        if is_master_process:
            count = [sum(p.numel() for p in group["params"]) for group in groups]
            print(
                f"optimizer: AdamW{' (fused)' if fused else ''}, weight decay {weight_decay:g} on "
                f"{len(decayed)} tensors ({count[0]:,} parameters), none on {len(others)} ({count[1]:,})"
            )
        options = {"fused": True} if fused else {}
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, **options)

    @torch.inference_mode()
    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        num_words: int | None = None,
        use_cache: bool = True,
    ) -> Iterator[Tensor]:
        """Samples one token after the other; the arguments are those of `generate`. Yields (B, 1) ids."""
        block_size = self.config.block_size
        context = idx[:, -block_size:]  # (B, T)
        room = min(block_size, context.size(1) + max_new_tokens)
        cache = KeyValueCache(self.config, idx.size(0), room, self.lm_head.weight) if use_cache else None
        for _ in range(max_new_tokens):
            if context.size(1) > block_size:
                # Positions are absolute, so a full cache cannot slide: start again from half a block.
                context = context[:, -max(1, block_size // 2) :]
                if cache is not None:
                    cache.length = 0
            unseen = context if cache is None else context[:, cache.length :]
            logits = self.lm_head(self.hidden_states(unseen, cache=cache)[:, -1]).float()  # (B, V)
            token = sample_token(logits[:, :num_words], temperature, top_k, top_p, generator)
            context = torch.cat((context, token), dim=1)
            yield token

    def generate(self, idx: Tensor, max_new_tokens: int, **sampling) -> Tensor:
        """Continues token sequences.

        Args:
            idx: (B, T) prompts of one length; only the last block_size tokens are read.
            max_new_tokens: how many to add.
            temperature: 0 takes the likeliest token; below 1 sharpens, above 1 flattens the distribution.
            top_k: sample from the k likeliest tokens only.
            top_p: of those, sample from the smallest set whose probabilities add up to p (Holtzman et al.
                2020).
            generator: source of randomness, on the model's device; the global one is never touched if it is
                given.
            num_words: ids from here on are padding of the vocabulary and never sampled.
            use_cache: keep keys and values; the tokens are the same without, only slower.

        Returns:
            (B, T + max_new_tokens) prompts and continuations.

        Raises:
            FloatingPointError: the model's logits are not finite.
        """
        return torch.cat([idx, *self.stream(idx, max_new_tokens, **sampling)], dim=1)

    @classmethod
    def load(cls, source: str | Path, device: str | torch.device = "cpu") -> GPT:
        """A model from whatever names one: a checkpoint file, a GPT-2 size, or a folder of transformers."""
        if str(source) in PRETRAINED_CONFIGS or Path(source).is_dir():
            return cls.from_pretrained(source).to(device)
        if not str(source).endswith(".pt") and not Path(source).exists():
            raise UserError(
                f"unknown model {str(source)!r}; choose {', '.join(PRETRAINED_CONFIGS)}",
                "or give a checkpoint (log/model_*.pt) or a folder of transformers",
            )
        return cls.from_checkpoint(source, device)

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str | torch.device = "cpu") -> GPT:
        """The model in a checkpoint of train_gpt.py or of nanoGPT.

        Raises UserError if the file is missing, damaged, or none of these.
        """
        from utils.weights.checkpoint import load_model_file

        saved = load_model_file(path)
        model = cls(GPTConfig(**saved["config"]))
        try:
            model.load_state_dict(saved["model"])
        except RuntimeError as error:
            reason = " ".join(str(error).split("\n")[1:2]).strip()[:200]
            what = f"{path} does not hold the weights of its config: {reason}"
            raise UserError(what, "use a checkpoint that is whole") from error
        model.tokenizer_state = saved["tokenizer"]
        return model.to(device)

    @classmethod
    def from_pretrained(cls, name_or_dir: str | Path) -> GPT:
        """OpenAI's weights by name, or a folder that `save_pretrained` of transformers wrote.

        Raises:
            UserError: unknown name, transformers is missing, the weights cannot be had, or they are no GPT-2.
        """
        from utils.weights.pretrained import load_gpt2_weights, tokenizer_state_of

        config, state_dict = load_gpt2_weights(str(name_or_dir), PRETRAINED_CONFIGS)
        model = cls(GPTConfig(**config))
        model.load_state_dict(state_dict)
        model.tokenizer_state = tokenizer_state_of(str(name_or_dir))
        return model


def sample_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws one id (B, 1) from each row of logits (B, V).

    Raises FloatingPointError for logits that are not finite.
    """
    if not torch.isfinite(logits).all():
        raise FloatingPointError("non-finite logits")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    # Sorted by likelihood only as far as needed: the sort is most of the work.
    top_k = min(top_k or logits.size(-1), logits.size(-1))
    ids = None
    if top_k < logits.size(-1) or top_p is not None:
        logits, ids = logits.topk(top_k, dim=-1)
    # Shifted first, so that dividing by a tiny temperature gives -inf at worst, never inf - inf.
    probs = F.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    if top_p is not None:
        before = probs.cumsum(dim=-1) - probs  # of all likelier tokens: the first one always stays
        probs = probs.masked_fill(before >= top_p, 0.0)
    choice = torch.multinomial(probs, num_samples=1, generator=generator)  # (B, 1); normalises by itself
    return choice if ids is None else ids.gather(-1, choice)


def fused_adamw_runs_on(device_type: str) -> bool:
    """Whether AdamW's fused kernel is there: on CUDA since torch 2.0, on CPUs since 2.4, on MPS since 2.5."""
    if "fused" not in inspect.signature(torch.optim.AdamW).parameters:
        return False
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    since = {"cuda": (2, 0), "cpu": (2, 4), "mps": (2, 5)}
    return device_type in since and version >= since[device_type]
