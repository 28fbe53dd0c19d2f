"""Builds a model's chain of stages, which the planner reads and `models` executes, name for name.

Each stage has its FLOPs and bytes on the largest rank of a mesh. A DeepSeek decoder layer reads:

    input_norm        norm     hidden (+ residual) -> hidden, residual
    qkv_a_proj        row      hidden -> qkv_latent              [q_lora_rank + kv_lora_rank + qk_rope_head_dim]
    latent_norm       row      qkv_latent -> qkv_latent
    attention         sharded  qkv_latent at GROUP -> hidden, a sum owed over the group
    post_attn_norm    norm     hidden (+ residual) -> hidden, residual
    router            row      hidden -> topk_ids, topk_weights
    shared_expert     row      hidden -> shared                  (only where its weights are replicated)
    experts (or mlp)  sharded  hidden, topk at FULL -> hidden, a sum owed over the world

Without ``q_lora_rank`` (DeepSeek-V2-Lite) queries come from ``hidden`` itself, so attention reads that too. Layers with
grouped-query attention have neither ``qkv_a_proj`` nor ``latent_norm``: attention reads ``hidden``.

After the attention of the last layer no stage looks at other rows of a sequence. Those stages may run only on the rows
whose logits are needed, so the last layer is a layer type of its own.
"""

from __future__ import annotations

from dataclasses import replace

from narrows.arch.config import MLA, ModelConfig
from narrows.arch.stages import (
    AttentionCore,
    Chain,
    Field,
    FieldRoles,
    Gemm,
    GroupedGemm,
    LayerType,
    Norm,
    PriceClass,
    Role,
    RoutedExperts,
    RowSet,
    Stage,
    StageKind,
    Stream,
)
from narrows.arch.weight_sharding import (
    DENSE_DOWN,
    EXPERT_DOWN,
    SHARED_DOWN,
    WeightSharding,
    check_mesh,
    head_spans,
    kv_head_spans,
    split_blocks,
    split_columns,
)
from narrows.arch.weights import head_weights
from narrows.layout import Layout, Mesh, full, group, owed, split_evenly

__all__ = ["build_chain"]


def build_chain(
    config: ModelConfig,
    mesh: Mesh,
    sharding: WeightSharding | None = None,
    *,
    itemsize: int = 2,
    want_logits: bool = False,
) -> Chain:
    """The chain of ``config`` on ``mesh`` with weights held as ``sharding`` says.

    Args:
        itemsize: bytes per value of the activations (2 for bfloat16).
        want_logits: whole rows of logits must reach every rank (verification, log-probabilities); otherwise the
            planner may also send only each shard's best token.

    Raises:
        ConfigError: the model's units cannot be split over the mesh (see :func:`check_mesh`).
    """
    check_mesh(config, mesh)
    builder = _Builder(config, mesh, sharding or WeightSharding(), itemsize)
    layer_types: list[LayerType] = []
    kinds: list[tuple[bool, int | None, bool]] = []
    layers: list[int] = []
    for layer in range(config.num_hidden_layers):
        kind = is_moe, window, is_last = (
            config.is_moe_layer(layer),
            config.sliding_window(layer),
            layer == config.num_hidden_layers - 1,
        )
        if kind not in kinds:
            kinds.append(kind)
            name = ("moe" if is_moe else "dense") + (" sliding" if window is not None else "")
            stages = builder.layer(is_moe, window)
            layer_types.append(LayerType(name=name, stages=_for_any_rows(stages) if is_last else stages))
        layers.append(kinds.index(kind))
    fields = builder.fields()
    return Chain(
        prologue=(builder.embed(),),
        layer_types=tuple(layer_types),
        layers=tuple(layers),
        epilogue=builder.epilogue(want_logits),
        fields=fields,
        roles=FieldRoles(
            input="ids",
            output="next_ids",
            stream="hidden",
            residual="residual",
            addends=("shared", "residual"),
            encodable=frozenset({"hidden", "qkv_latent"} & set(fields)),
            bundle_of={field.name: field.bundle for field in fields.values()},
        ),
    )


def _for_any_rows(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """A layer's stages where no other layer follows: those after attention need only the rows with logits."""
    after = 1 + next(i for i, stage in enumerate(stages) if stage.name == "attention")
    return (*stages[:after], *(replace(stage, any_rows=True) for stage in stages[after:]))


class _Builder:
    def __init__(self, config: ModelConfig, mesh: Mesh, sharding: WeightSharding, itemsize: int) -> None:
        self.config, self.mesh, self.sharding, self.itemsize = config, mesh, sharding, itemsize
        self.full, self.group = full(mesh), group(mesh)
        self.owed_world = owed(mesh)
        self.owed_group = owed(mesh, mesh.num_axes - 1)

    def fields(self) -> dict[str, Field]:
        config, mesh, size = self.config, self.mesh, self.itemsize
        hidden = config.hidden_size
        fields = [
            Field(name="ids", width=1, itemsize=4, bundle="ids"),
            Field(name="hidden", width=hidden, itemsize=size, bundle="hidden"),
            Field(name="residual", width=hidden, itemsize=size, bundle="residual"),
            Field(name="shared", width=hidden, itemsize=size, bundle="shared"),
        ]
        if isinstance(config.attention, MLA):
            width = config.attention.qkv_latent_dim
            columns = split_evenly(width, mesh.group_size)
            fields.append(Field(name="qkv_latent", width=width, itemsize=size, bundle="qkv_latent", columns=columns))
        if config.moe is not None:
            top_k = config.moe.num_experts_per_tok
            fields.append(Field(name="topk_ids", width=top_k, itemsize=4, bundle="topk"))
            fields.append(Field(name="topk_weights", width=top_k, itemsize=4, bundle="topk"))
        vocab = tuple(hi - lo for lo, hi in split_blocks(config.vocab_size, mesh.size))
        two_each = (2,) * mesh.size
        fields += [
            Field(name="logits", width=config.vocab_size, itemsize=size, bundle="logits", columns=vocab),
            Field(name="candidates", width=2 * mesh.size, itemsize=8, bundle="candidates", columns=two_each),
            Field(name="next_ids", width=1, itemsize=8, bundle="next_ids"),
        ]
        return {field.name: field for field in fields}

    # -- before the layers -------------------------------------------------------------------------------------------

    def embed(self) -> Stage:
        replicated = self.sharding.embed == "replicated"
        return Stage(
            name="embed",
            kind=StageKind.ROW if replicated else StageKind.SHARDED,
            price_class=PriceClass.EMBED,
            reads=("ids",),
            writes=("hidden",),
            frees=("ids",),
            work=(Stream(2 * self.config.hidden_size * self.itemsize),),
            accepts=None if replicated else self.full,
            leaves=None if replicated else self.owed_world,
        )

    # -- one decoder layer -------------------------------------------------------------------------------------------

    def layer(self, is_moe: bool, window: int | None) -> tuple[Stage, ...]:
        attention = self.mla() if isinstance(self.config.attention, MLA) else self.gqa(window)
        feed_forward = self.moe() if is_moe else (self.mlp(),)
        return (
            self.norm("input_norm", Role.ATTENTION_NORM),
            *attention,
            self.norm("post_attn_norm", Role.MLP_NORM),
            *feed_forward,
        )

    def norm(self, name: str, role: Role) -> Stage:
        final = role is Role.FINAL_NORM
        hidden = self.config.hidden_size
        return Stage(
            name=name,
            kind=StageKind.NORM,
            price_class=PriceClass.NORM,
            reads=("hidden", "residual"),
            writes=("hidden",) if final else ("hidden", "residual"),
            frees=("residual",) if final else (),
            work=(Norm(hidden, fused=True),),
            plain_work=(Norm(hidden, fused=False),),
            any_rows=final,
            role=role,
            cut_after=True,
        )

    def mla(self) -> tuple[Stage, ...]:
        config, mla = self.config, self.config.attention
        assert isinstance(mla, MLA)
        hidden, tp = config.hidden_size, self.mesh.group_size
        lo, hi = head_spans(config, tp)[0]
        heads = hi - lo
        column = self.sharding.qkv_a_proj == "column"
        width = split_evenly(mla.qkv_latent_dim, tp)[0] if column else mla.qkv_latent_dim
        query_from_hidden = mla.q_lora_rank is None
        qkv_a_proj = Stage(
            name="qkv_a_proj",
            kind=StageKind.SHARDED if column else StageKind.ROW,
            price_class=PriceClass.QKV_A_PROJ,
            reads=("hidden",),
            writes=("qkv_latent",),
            frees=() if query_from_hidden else ("hidden",),
            work=(Gemm(width, hidden),),
            accepts=self.group if column else None,
            leaves=self._group_columns() if column else None,
            role=Role.LATENT_PROJ,
        )
        latent_norm = Stage(
            name="latent_norm",
            kind=StageKind.ROW,
            price_class=PriceClass.NORM,
            reads=("qkv_latent",),
            writes=("qkv_latent",),
            work=(Norm((mla.q_lora_rank or 0) + mla.kv_lora_rank, fused=False, streamed=True),),
            role=Role.LATENT_NORM,
        )
        q_input = hidden if mla.q_lora_rank is None else mla.q_lora_rank
        attention = Stage(
            name="attention",
            kind=StageKind.SHARDED,
            price_class=PriceClass.ATTENTION,
            reads=("hidden", "qkv_latent") if query_from_hidden else ("qkv_latent",),
            writes=("hidden",),
            frees=("qkv_latent",),
            work=(
                Gemm(heads * mla.qk_head_dim, q_input),
                Gemm(heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank),
                AttentionCore(
                    heads=heads,
                    prefill_dims=mla.qk_head_dim + mla.v_head_dim,
                    decode_dims=mla.latent_dim + mla.kv_lora_rank,
                    kv_row_bytes=mla.latent_dim * self.itemsize,
                ),
                Gemm(hidden, heads * mla.v_head_dim),
            ),
            absorbed=1,
            accepts=self.group,
            leaves=self.owed_group,
            cut_after=True,
        )
        return qkv_a_proj, latent_norm, attention

    def _group_columns(self) -> Layout:
        return Layout.on(self.mesh, "S" * (self.mesh.num_axes - 1) + "C")

    def gqa(self, window: int | None) -> tuple[Stage, ...]:
        config, gqa = self.config, self.config.attention
        assert not isinstance(gqa, MLA)
        tp = self.mesh.group_size
        heads = max(hi - lo for lo, hi in head_spans(config, tp))
        kv_heads = max(hi - lo for lo, hi in kv_head_spans(config, tp))
        attention = Stage(
            name="attention",
            kind=StageKind.SHARDED,
            price_class=PriceClass.ATTENTION,
            reads=("hidden",),
            writes=("hidden",),
            work=(
                Gemm((heads + 2 * kv_heads) * gqa.head_dim, config.hidden_size),
                AttentionCore(
                    heads=heads,
                    prefill_dims=2 * gqa.head_dim,
                    decode_dims=2 * gqa.head_dim,
                    kv_row_bytes=2 * kv_heads * gqa.head_dim * self.itemsize,
                ),
                Gemm(config.hidden_size, heads * gqa.head_dim),
            ),
            accepts=self.group,
            leaves=self.owed_group,
            cut_after=True,
            window=window,
        )
        return (attention,)

    def mlp(self) -> Stage:
        lo, hi = split_columns(self.config, DENSE_DOWN, self.config.intermediate_size, self.mesh.size)[0]
        return Stage(
            name="mlp",
            kind=StageKind.SHARDED,
            price_class=PriceClass.MLP,
            reads=("hidden",),
            writes=("hidden",),
            work=self._mlp_work(hi - lo),
            accepts=self.full,
            leaves=self.owed_world,
        )

    def _mlp_work(self, columns: int) -> tuple[Gemm | Stream, ...]:
        hidden = self.config.hidden_size
        return Gemm(2 * columns, hidden), Stream(3 * columns * self.itemsize), Gemm(hidden, columns)

    def moe(self) -> tuple[Stage, ...]:
        config, moe, world = self.config, self.config.moe, self.mesh.size
        assert moe is not None
        hidden, size, top_k = config.hidden_size, self.itemsize, moe.num_experts_per_tok
        whole = self.sharding.experts == "whole"
        lo, hi = split_columns(config, EXPERT_DOWN, moe.moe_intermediate_size, world)[0]
        columns = moe.moe_intermediate_size if whole else hi - lo
        held = split_evenly(moe.n_routed_experts, world)[0] if whole else moe.n_routed_experts
        pairs = top_k * held / moe.n_routed_experts
        router = Stage(
            name="router",
            kind=StageKind.ROW,
            price_class=PriceClass.ROUTER,
            reads=("hidden",),
            writes=("topk_ids", "topk_weights"),
            work=(Gemm(moe.n_routed_experts, hidden, "float32_sums"), Stream(4 * 4 * moe.n_routed_experts)),
            role=Role.ROUTER,
        )
        ranks = world if whole else 1
        inner, sums = 3 * columns * size * pairs, pairs * hidden * size
        experts_work = (
            GroupedGemm(held, pairs, 2 * columns, hidden, ranks),
            Stream(0.0, inner) if whole else Stream(inner),
            GroupedGemm(held, pairs, hidden, columns, ranks),
            Stream(hidden * size, sums) if whole else Stream(hidden * size + sums),
        )
        replicated = self.sharding.shared_expert == "replicated" and moe.n_shared_experts > 0
        shared_size = moe.shared_intermediate_size
        shared_columns = split_columns(config, SHARED_DOWN, shared_size, world)[0][1] if shared_size else 0
        experts = Stage(
            name="experts",
            kind=StageKind.SHARDED,
            price_class=PriceClass.EXPERTS,
            reads=("hidden", "topk_ids", "topk_weights"),
            writes=("hidden",),
            frees=("topk_ids", "topk_weights"),
            routed=RoutedExperts(hidden, moe.moe_intermediate_size, moe.n_routed_experts, top_k, world, whole),
            work=experts_work + (self._mlp_work(shared_columns) if moe.n_shared_experts and not replicated else ()),
            accepts=self.full,
            leaves=self.owed_world,
        )
        if not replicated:
            return router, experts
        shared_expert = Stage(
            name="shared_expert",
            kind=StageKind.ROW,
            price_class=PriceClass.EXPERTS,
            reads=("hidden",),
            writes=("shared",),
            work=self._mlp_work(moe.shared_intermediate_size),
        )
        return router, shared_expert, experts

    # -- after the layers --------------------------------------------------------------------------------------------

    def epilogue(self, want_logits: bool) -> tuple[Stage, ...]:
        config, mesh = self.config, self.mesh
        lo, hi = split_blocks(config.vocab_size, mesh.size)[0]
        columns = Layout.on(mesh, "C" * mesh.num_axes)
        one_rank, head = mesh.size == 1, head_weights(config, mesh)
        lm_head = Stage(
            name="lm_head",
            kind=StageKind.SHARDED,
            price_class=PriceClass.LM_HEAD,
            reads=("hidden",),
            writes=("logits",),
            frees=("hidden",),
            work=(Gemm(hi - lo, config.hidden_size, "weights" if head["lm_head"].blocks else "activations"),),
            accepts=self.full,
            leaves=columns,
            row_set=RowSet.LOGITS,
            role=Role.LM_HEAD,
        )
        sample = Stage(
            name="sample",
            kind=StageKind.SHARDED,
            price_class=PriceClass.SAMPLE,
            reads=("logits",),
            writes=("next_ids",),
            work=(Stream(4 * config.vocab_size),),
            accepts=self.full,
            leaves=self.full,
            row_set=RowSet.LOGITS,
            role=Role.SAMPLE,
        )
        if want_logits or one_rank:
            return self.norm("final_norm", Role.FINAL_NORM), lm_head, sample
        shard_argmax = Stage(
            name="shard_argmax",
            kind=StageKind.SHARDED,
            price_class=PriceClass.SAMPLE,
            reads=("logits",),
            writes=("candidates",),
            frees=("logits",),
            work=(Stream(4 * (hi - lo)),),
            accepts=columns,
            leaves=columns,
            row_set=RowSet.LOGITS,
        )
        pick = Stage(
            name="pick",
            kind=StageKind.SHARDED,
            price_class=PriceClass.SAMPLE,
            reads=("candidates",),
            writes=("next_ids",),
            frees=("candidates",),
            work=(Stream(16 * mesh.size),),
            accepts=self.full,
            leaves=self.full,
            row_set=RowSet.LOGITS,
        )
        return self.norm("final_norm", Role.FINAL_NORM), lm_head, shard_argmax, pick
