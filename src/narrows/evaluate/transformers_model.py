"""A checkpoint as transformers computes it, in float32: the outside reference of `verify --against transformers`.

Needs transformers (the extra ``against``). Only its own classes run, never code that comes with a checkpoint, and only
plain safetensors are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrows.arch.config import ModelConfig
from narrows.arch.weight_sharding import WeightSharding
from narrows.convert.gguf_header import find_gguf
from narrows.cost.memory import weight_bytes
from narrows.engine.free_memory import free_memory
from narrows.errors import ConfigError
from narrows.layout import Mesh
from narrows.sched.batch import Batch

__all__ = ["ReferenceStep", "TransformersModel", "load_transformers", "transformers_version"]

_GATE = re.compile(r"\.layers\.(\d+)\..*\.(gate|router)$")
_HEADROOM = 1.1
"""Memory of loading beside the weights: the tensor that is being read, and the experts of a layer while they are
stacked."""


@dataclass(frozen=True, slots=True)
class ReferenceStep:
    """Logits [rows, vocab_size] of the rows that ask for them, and by MoE layer the experts of all rows [rows, K]."""

    logits: Tensor
    routing: dict[int, Tensor]


class TransformersModel:
    """A model of transformers that computes the rows of an engine's steps.

    Prompts are run whole, each alone: this verifies that an engine may cut prompts into chunks and run them together.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self._caches: dict[int, Any] = {}
        self._prompts: list[ReferenceStep] = []
        self._routing: dict[int, Tensor] = {}
        for name, module in model.named_modules():
            if found := _GATE.search(name):
                module.register_forward_hook(self._keeper(int(found[1])))

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Forget all sequences, and run these prompts; request i is prompt i."""
        self._caches.clear()
        self._prompts = [self._forward(request, prompt, 0) for request, prompt in enumerate(prompts)]

    def step(self, batch: Batch) -> ReferenceStep:
        """The logits of this step's rows of prompts, computed before; its other rows are run now."""
        parts: list[tuple[ReferenceStep, slice, slice]] = []
        for group in batch.groups:
            for chunk in group:
                prompt = self._prompts[chunk.request]
                first, stop = chunk.start, chunk.start + len(chunk.tokens)
                if stop > len(prompt.logits):
                    prompt = self._forward(chunk.request, chunk.tokens, first)
                    first, stop = 0, len(chunk.tokens)
                parts.append((prompt, slice(first, stop), slice(stop - chunk.num_logits, stop)))
        layers = sorted({layer for part, _, _ in parts for layer in part.routing})
        return ReferenceStep(
            torch.cat([part.logits[wanted] for part, _, wanted in parts]),
            {layer: torch.cat([part.routing[layer][rows] for part, rows, _ in parts]) for layer in layers},
        )

    @torch.no_grad()
    def _forward(self, request: int, tokens: Sequence[int], start: int) -> ReferenceStep:
        """All rows' logits and experts."""
        self._routing = {}
        self._forget_lengths()
        try:
            out = self.model(
                input_ids=torch.tensor([list(tokens)]),
                position_ids=torch.arange(start, start + len(tokens)).unsqueeze(0),
                past_key_values=self._caches.get(request),
                use_cache=True,
            )
        except Exception as error:  # as at loading: any error here concerns this checkpoint
            raise ConfigError(_cannot("run", self.model.name_or_path, error)) from error
        self._caches[request] = out.past_key_values
        return ReferenceStep(out.logits[0].float(), self._routing)

    def _forget_lengths(self) -> None:
        """Rotary positions of type ``dynamic`` remember the longest sequence that was run, of whichever request."""
        for module in self.model.modules():
            if getattr(module, "rope_type", None) == "dynamic":
                module.max_seq_len_cached = module.original_max_seq_len
                module.inv_freq = module.original_inv_freq

    def _keeper(self, layer: int) -> Any:
        """A router of transformers returns (its logits, the experts' weights, their ids)."""

        def keep(_module: Any, _args: Any, out: Any) -> None:
            self._routing[layer] = out[-1].reshape(-1, out[-1].shape[-1])

        return keep


def load_transformers(path: Path, config: ModelConfig, *, room: int | None = None) -> TransformersModel:
    """The checkpoint in the folder ``path``, in float32.

    Args:
        config: what narrows read of it, for its size.
        room: bytes that it may take; None: free memory.

    Raises:
        ConfigError: transformers is missing or cannot load it, or it does not fit.
    """
    auto_model = _transformers().AutoModelForCausalLM
    if find_gguf(path) is not None:
        raise ConfigError(
            f"{path}: --against transformers reads folders, not GGUF; make one with `narrows convert {path} FOLDER` "
            "(its weights are the dequantised ones) and verify that"
        )
    if not path.is_dir():
        raise ConfigError(f"--against transformers reads a checkpoint folder, and {path} is none")
    if config.quantization is not None:
        raise ConfigError(
            f"{path}: --against transformers reads plain weights, not {config.quantization.quant_method}; take the "
            "unquantised checkpoint"
        )
    _check_room(path, config, free_memory() if room is None else room)
    try:
        with _silent():
            model, info = auto_model.from_pretrained(
                str(path),
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation="eager",
                experts_implementation="eager",
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except Exception as error:  # any error of any library here concerns this checkpoint
        raise ConfigError(_cannot("load", path, error)) from error
    # transformers initialises missing tensors at random.
    absent = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if absent:
        raise ConfigError(f"{path}: transformers finds no tensor for {len(absent)} of its weights, first {absent[0]}")
    return TransformersModel(model)


def transformers_version() -> str:
    """The version that is installed."""
    return str(_transformers().__version__)


def _cannot(do: str, path: Path | str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"{path}: transformers {transformers_version()} cannot {do} it ({type(error).__name__}: {reason[:300]})"


def _transformers() -> Any:
    try:
        import transformers  # noqa: PLC0415 - an optional extra
    except ImportError:
        raise ConfigError("--against transformers needs transformers: pip install 'narrows[against]'") from None
    return transformers


def _check_room(path: Path, config: ModelConfig, room: int) -> None:
    weights = weight_bytes(config, Mesh.of(dp=1, tp=1), WeightSharding(), "fp32", 0)
    needed = weights * _HEADROOM
    if needed > room:
        raise ConfigError(
            f"{path}: transformers would hold {needed / 1e9:.1f} GB ({weights / 1e9:.1f} GB of weights in float32), "
            f"and {room / 1e9:.1f} GB are free; take a smaller model of the family, or a checkpoint with fewer layers"
        )


@contextmanager
def _silent() -> Iterator[None]:
    """No progress bars and no advice on standard error."""
    logging = _transformers().utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
