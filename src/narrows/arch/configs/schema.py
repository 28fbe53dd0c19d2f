"""Base of all families' schemas: the fields that every decoder has, and the order in which a file is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

from narrows.arch.configs.foreign import is_foreign
from narrows.arch.configs.harmless import HARMLESS
from narrows.arch.configs.needs import (
    ConfigObject,
    Epsilon,
    Flag,
    Heads,
    Layers,
    Needs,
    Positions,
    Text,
    TokenId,
    Vocabulary,
    Width,
    validated,
)
from narrows.arch.configs.quantization import OTHER_NAMES, read_dtype, read_quantization
from narrows.arch.configs.rope import ROPE_FIELDS, Head, read_rope
from narrows.arch.configs.shown import shown
from narrows.arch.model import GQA, HIDDEN_ACTS, MLA, ModelConfig, MoE
from narrows.errors import CheckpointError, ConfigError

__all__ = ["ELSEWHERE", "EVERYWHERE", "Only", "Schema"]

ELSEWHERE = ("dtype", "torch_dtype", "quantization_config", *OTHER_NAMES, *ROPE_FIELDS)
"""Fields of every family that ``quantization.py`` and ``rope.py`` read."""


@dataclass(frozen=True, slots=True)
class Only:
    """A field with one supported value, and the reason for refusing others; null means that value."""

    value: Any
    why: str

    def admits(self, value: object) -> bool:
        same = value == self.value and isinstance(value, bool) == isinstance(self.value, bool)
        return same or value is None


EVERYWHERE: Mapping[str, Only] = MappingProxyType(
    {
        "hidden_activation": Only("silu", "hidden_act is the field of these families"),
        "activation_function": Only("silu", "hidden_act is the field of these families"),
        "is_encoder_decoder": Only(False, "narrows runs decoders"),
        "add_cross_attention": Only(False, "narrows runs decoders"),
        "is_causal": Only(True, "a token sees those before it"),
        "causal": Only(True, "a token sees those before it"),
        "use_bidirectional_attention": Only(False, "a token sees those before it"),
    }
)
"""Fields of any config of which one value is computed."""


class Schema(ConfigObject):
    """The fields of ``config.json`` that shape a family's model. A subclass is a family; its fields' defaults are those
    of the family's class in transformers, and fields that size tensors have none, so that they must be there.

    ``model_types``: what the file may call it, the first being what narrows does. ``class_names``: how the names in
    ``architectures`` begin. ``aliases``: other names of fields. ``only``: fields of which one value is computed.
    ``harmless``: fields of the family that change no number, and why.
    """

    model_types: ClassVar[tuple[str, ...]]
    class_names: ClassVar[tuple[str, ...]]
    aliases: ClassVar[Mapping[str, str]] = MappingProxyType({})
    only: ClassVar[Mapping[str, Only]] = MappingProxyType({})
    harmless: ClassVar[Mapping[str, str]] = MappingProxyType({})

    hidden_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Heads
    vocab_size: Vocabulary
    hidden_act: Text = "silu"
    rms_norm_eps: Epsilon = 1e-6
    max_position_embeddings: Positions
    tie_word_embeddings: Flag = False
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | Annotated[list[TokenId], Needs("a list of token ids")] | None = None

    # -- overridden by families --------------------------------------------------------------------------------------

    def attention(self) -> MLA | GQA:
        """Its attention."""
        raise NotImplementedError

    def moe(self) -> MoE | None:
        """Its routed experts, if it has any."""
        return None

    def head(self) -> Head:
        """The rotated part of a head."""
        raise NotImplementedError

    def dense_size(self, moe: MoE | None) -> int:
        """Columns of the MLP of dense layers, 0 without any."""
        raise NotImplementedError

    def has_mlp_bias(self) -> bool:
        return False

    def notes(self) -> tuple[str, ...]:
        """Notes about fields that are read but not used."""
        return ()

    # -- from a file to a model --------------------------------------------------------------------------------------

    @classmethod
    def read(cls, raw: Mapping[str, Any], name: str) -> ModelConfig:
        """The model that the fields of a ``config.json`` describe.

        Raises:
            CheckpointError: a field is missing, is invalid, or contradicts another.
            ConfigError: an unsupported variant.
        """
        cls._check_architectures(raw)
        fields, unknown = cls._sorted(cls._named(raw))
        self = validated(cls, fields)
        rope, unused = read_rope(raw, self.head())
        return self._model(raw, name, rope, (*unknown, *unused))

    def _model(self, raw: Mapping[str, Any], name: str, rope: Any, unused: tuple[str, ...]) -> ModelConfig:
        moe, eos = self.moe(), self.eos_token_id
        hidden_act = "silu" if self.hidden_act == "swish" else self.hidden_act
        if hidden_act not in HIDDEN_ACTS:
            known = ", ".join(sorted(HIDDEN_ACTS))
            raise ConfigError(f"hidden_act {shown(hidden_act)} is not known; narrows knows {known}")
        notes = self.notes()
        if unused:
            notes += (f"config.json has fields that narrows does not know and does not use: {', '.join(unused)}",)
        return ModelConfig(
            name=name,
            model_type=self.model_types[0],
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.dense_size(moe),
            vocab_size=self.vocab_size,
            attention=self.attention(),
            moe=moe,
            rms_norm_eps=self.rms_norm_eps,
            max_position_embeddings=self.max_position_embeddings,
            rope=rope,
            hidden_act=hidden_act,
            tie_word_embeddings=self.tie_word_embeddings,
            dtype=read_dtype(raw),
            eos_token_id=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            bos_token_id=self.bos_token_id,
            mlp_bias=self.has_mlp_bias(),
            quantization=read_quantization(raw),
            notes=notes,
        )

    @classmethod
    def _check_architectures(cls, raw: Mapping[str, Any]) -> None:
        given = raw.get("architectures")
        if given is None or given == []:
            return
        if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
            raise CheckpointError(f"architectures is {shown(given)}, where a list of texts is needed")
        known = {(begin + end).lower() for begin in cls.class_names for end in ("ForCausalLM", "Model")}
        if not any(each.lower() in known for each in given):
            raise ConfigError(
                f"architectures is {shown(given)}, where model_type {shown(cls.model_types[0])} is "
                f"{cls.class_names[0]}ForCausalLM; a model of another kind would be computed wrongly"
            )

    @classmethod
    def _named(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """``raw`` with every field under one name."""
        fields = {name: value for name, value in raw.items() if name not in cls.aliases}
        for other, name in cls.aliases.items():
            if other not in raw:
                continue
            if name in fields and fields[name] != raw[other]:
                raise CheckpointError(
                    f"{name} is {shown(fields[name])} and {other}, its other name, is {shown(raw[other])}"
                )
            fields[name] = raw[other]
        return fields

    @classmethod
    def _sorted(cls, raw: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The fields to read, and the names of those that are unknown."""
        read: dict[str, Any] = {}
        unknown: list[str] = []
        for name, value in raw.items():
            if name in cls.model_fields:
                read[name] = value
            elif (only := cls.only.get(name) or EVERYWHERE.get(name)) is not None:
                if not only.admits(value):
                    raise ConfigError(f"{name} is {shown(value)}; only {shown(only.value)} is computed: {only.why}")
            elif name in ELSEWHERE or name in cls.harmless or name in HARMLESS or name.startswith("_"):
                pass
            elif not is_foreign(name, value) and value is not None:
                unknown.append(shown(name).strip('"'))
        return read, tuple(sorted(unknown))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The value of each field that may be left out."""
        return {name: field.default for name, field in cls.model_fields.items() if not field.is_required()}
