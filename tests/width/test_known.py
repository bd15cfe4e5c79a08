"""What is known of module classes: small modules with the names, the shapes and the products of the sources.

The number of weights that one output depends on is the fan_in. It is counted in the gradient of the output, so no test repeats
what `known.py` says. All sizes differ, so the number tells the dimension.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lwadamw import Matrix, Output
from lwadamw.width.known import KNOWN, known_roles
from lwadamw.width.patterns import matcher
from lwadamw.width.roles import Decided, decide
from lwadamw.width.specs import check_spec

E, IN, OUT = 3, 5, 7
Product = Callable[[Tensor], Tensor]


def x(*shape: int) -> Tensor:
    return torch.rand(shape) + 0.5


def named(key: str, parameters: dict[str, tuple[int, ...]] | None = None, **children: nn.Module | int) -> nn.Module:
    """Return a module whose class has the name and the module path of a key of KNOWN."""
    path, _, name = key.rpartition(":")
    module: nn.Module = type(name, (nn.Module,), {"__module__": path or "modeling"})()
    for attribute, shape in (parameters or {}).items():
        setattr(module, attribute, nn.Parameter(torch.rand(shape) + 0.5))
    for attribute, child in children.items():
        setattr(module, attribute, child)
    return module


def decided(module: nn.Module) -> dict[str, Decided]:
    """Return what is decided for a module inside a model, by the name within the module."""
    model = nn.Module()
    model.block = module
    return {d.name.removeprefix("block."): d for d in decide(model, {})}


# For each class, what it multiplies: the parameter, its shape, and one product with it, as its forward pass has it.
PRODUCTS: dict[str, dict[str, tuple[tuple[int, ...], Product]]] = {
    "GptOssExperts": {
        "gate_up_proj": ((E, IN, 2 * OUT), lambda w: x(2, IN) @ w[1]),
        "down_proj": ((E, OUT, IN), lambda w: x(2, OUT) @ w[1]),
    },
    "Llama4TextExperts": {
        "gate_up_proj": ((E, IN, 2 * OUT), lambda w: torch.bmm(x(E, 2, IN), w)),
        "down_proj": ((E, OUT, IN), lambda w: torch.bmm(x(E, 2, OUT), w)),
    },
    "LongcatFlashExperts": {
        "gate_up_proj": ((E, 2 * OUT, IN), lambda w: F.linear(x(2, IN), w[1])),
        "down_proj": ((E, IN, OUT), lambda w: F.linear(x(2, OUT), w[1])),
    },
    "InklingSharedExperts": {
        "up_proj": ((E, OUT, IN), lambda w: torch.bmm(x(E, 2, IN), w.transpose(1, 2))),
        "down_proj": ((E, IN, OUT), lambda w: torch.bmm(x(E, 2, OUT), w.transpose(1, 2))),
    },
    "JetMoeParallelExperts": {"weight": ((E, OUT, IN), lambda w: F.linear(x(2, IN), w[1]))},
    "AriaGroupedExpertsGemm": {"weight": ((E, IN, OUT), lambda w: x(2, IN) @ w[1])},
    "DbrxExpertGLU": {
        "w1": ((E * OUT, IN), lambda w: x(2, IN) @ w.view(E, OUT, IN)[1].T),
        "v1": ((E * OUT, IN), lambda w: x(2, IN) @ w.view(E, OUT, IN)[1].T),
        "w2": ((E * OUT, IN), lambda w: x(2, OUT) @ w.view(E, OUT, IN)[1]),
    },
    "megablocks.layers.mlp:MLP": {
        "w1": ((E, IN, OUT), lambda w: torch.bmm(x(E, 2, IN), w)),
        "w2": ((E, OUT, IN), lambda w: torch.bmm(x(E, 2, OUT), w)),
    },
    "megatron.core.transformer.moe.experts:GroupedMLP": {
        "weight1": ((IN, E * OUT), lambda w: torch.bmm(x(E, 2, IN), w.view(E, IN, -1))),
        "weight2": ((E * OUT, IN), lambda w: torch.bmm(x(E, 2, OUT), w.view(E, -1, IN))),
    },
    "GroupedLinear": {f"weight{i}": ((OUT, IN), lambda w: F.linear(x(2, IN), w)) for i in range(E)},
    "transformer_engine.pytorch.module.grouped_linear:GroupedLinear": {
        "weight": ((E, OUT, IN), lambda w: torch.bmm(x(E, 2, IN), w.transpose(1, 2))),
    },
    "transformer_engine.pytorch.module.layernorm_mlp:LayerNormMLP": {
        "fc1_weight": ((OUT, IN), lambda w: F.linear(x(2, IN), w)),
        "fc2_weight": ((IN, OUT), lambda w: F.linear(x(2, OUT), w)),
    },
    "torchtitan.models.moe.moe:GroupedExperts": {
        "w1": ((E, OUT, IN), lambda w: torch.bmm(x(E, 2, IN), w.transpose(-2, -1))),
        "w2": ((E, IN, OUT), lambda w: torch.bmm(x(E, 2, OUT), w.transpose(-2, -1))),
        "w3_EFD": ((E, OUT, IN), lambda w: torch.bmm(x(E, 2, IN), w.transpose(-2, -1))),
    },
    "torchtitan.overrides.fused_swiglu:FusedSwiGLU": {
        "w13": ((OUT, 2, IN), lambda w: torch.einsum("...d,hgd->...hg", x(2, IN), w)),
    },
    "megatron.core.transformer.moe.shared_experts:SharedExpertMLP": {
        "gate_weight": ((1, IN), lambda w: F.linear(x(2, IN), w)),
    },
    "DeepseekV4HyperConnection": {"fn": ((OUT, 4 * IN), lambda w: F.linear(x(2, 4 * IN), w))},
    "x_transformers.x_transformers:HyperConnection": {"dynamic_alpha_fn": ((IN, OUT), lambda w: x(2, IN) @ w)},
    "AMSoftmaxLoss": {"weight": ((IN, OUT), lambda w: torch.mm(x(2, IN), w))},
    "CsmCodebooksHead": {"weight": ((E, IN, OUT), lambda w: F.linear(x(2, IN), w[1].T))},
    "Gemma3MultiModalProjector": {"mm_input_projection_weight": ((IN, OUT), lambda w: x(2, 4, IN) @ w)},
    "open_clip.transformer:VisionTransformer": {"proj": ((IN, OUT), lambda w: x(2, IN) @ w)},
    "XLNetRelativeAttention": {
        "q": ((IN, 2, OUT), lambda w: torch.einsum("ibh,hnd->ibnd", x(3, 1, IN), w)),
        "o": ((IN, 2, OUT), lambda w: torch.einsum("ibnd,hnd->ibh", x(3, 1, 2, OUT), w)),
    },
    "FunnelRelMultiheadAttention": {"r_kernel": ((IN, 2, OUT), lambda w: torch.einsum("td,dnh->tnh", x(3, IN), w))},
    "ZambaMambaMixer": {"x_proj_weight": ((2, OUT, IN), lambda w: w[:, None] @ x(2, 1, IN, 3))},
    "RecurrentGemmaRglru": {
        "input_gate_weight": ((2, IN, OUT), lambda w: torch.baddbmm(torch.zeros(2, 1, OUT), x(2, 4, IN), w)),
    },
    "transformers.models.convbert.modeling_convbert:GroupedLinearLayer": {
        "weight": ((2, IN, OUT), lambda w: torch.matmul(x(2, 4, IN), w))
    },
    "LinearHeadwiseExpand": {"weight": ((2, OUT, IN), lambda w: torch.einsum("...hd,hod->...ho", x(4, 2, IN), w))},
    "sLSTMCell_vanilla": {"_recurrent_kernel_": ((2, OUT, IN), lambda w: x(4, 2, 1, IN) @ w.transpose(1, 2)[None])},
    "timm.layers.attention2d:MultiQueryAttentionV2": {
        "query_proj": ((2, OUT, IN), lambda w: torch.einsum("bnd,hkd->bnhk", x(1, 3, IN), w)),
        "key_proj": ((IN, OUT), lambda w: torch.einsum("bmd,dk->bmk", x(1, 3, IN), w)),
        "out_proj": ((OUT, 2, IN), lambda w: torch.einsum("bnhv,dhv->bdn", x(1, 3, 2, IN), w)),
    },
}


@pytest.mark.parametrize("key", PRODUCTS)
def test_the_fan_in_is_the_number_of_weights_that_one_output_depends_on(key: str) -> None:
    products = PRODUCTS[key]
    module = named(key, {name: shape for name, (shape, _) in products.items()})
    module.moe_num_experts = module.num_local_experts = E
    found = decided(module)
    for name, (_, product) in products.items():
        w = module.get_parameter(name)
        (gradient,) = torch.autograd.grad(product(w).flatten()[0], w)
        used = gradient != 0
        assert found[name].fan_in == int(used.sum()), name
        spec = next(spec for pattern, spec in known_roles(type(module)).items() if matcher(pattern)(name))
        assert isinstance(spec, (Matrix, Output)), name
        assert found[name].decision.role == type(spec).__name__.lower(), name


@pytest.mark.parametrize("key", KNOWN)
def test_every_entry_is_a_class_name_with_patterns_and_roles(key: str) -> None:
    path, _, name = key.rpartition(":")
    assert name.isidentifier(), key
    assert all(part.isidentifier() for part in path.split(".")) or not path, key
    assert KNOWN[key], key
    for pattern, spec in KNOWN[key].items():
        check_spec(spec)
        assert matcher(pattern)(
            pattern.replace("*", "a")
            .replace("?", "1")
            .replace("[qkvr]", "q")
            .replace("[0-9]", "1")
            .replace("[234]", "2")
            .replace("[123]", "2")
        ), pattern


@pytest.mark.parametrize(
    "key",
    ["torchtitan.experiments.llama4.model.moe:GroupedExperts", "moe:GroupedExperts", "torchtitanic:GroupedExperts"],
)
def test_a_class_of_the_same_name_elsewhere_is_not_known(key: str) -> None:
    found = decided(named(key, {"w1": (E, IN, OUT)}))
    assert found["w1"].decision.role is None


def linears(**sizes: tuple[int, int]) -> nn.Sequential:
    return nn.Sequential(OrderedDict({name: nn.Linear(*size) for name, size in sizes.items()}))


def modulation() -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(IN, 2 * IN))


def convolutions(stem: int, end: int) -> dict[str, nn.Module]:
    return {"conv_in": nn.Conv2d(stem, 8, 3), "middle": nn.Conv2d(8, 8, 3), "conv_out": nn.Conv2d(8, end, 3)}


# For each class, the modules in it, and the role and the fan_in of each of its weights.
MODULES: dict[str, tuple[dict[str, nn.Module], dict[str, tuple[str, int | None]]]] = {
    "FinalLayer": (
        {"linear": nn.Linear(IN, OUT), "adaLN_modulation": modulation()},
        {"linear.weight": ("output", IN), "adaLN_modulation.1.weight": ("matrix", IN)},
    ),
    "LuminaLayerNormContinuous": (
        {"linear_1": nn.Linear(OUT, IN), "linear_2": nn.Linear(IN, 4)},
        {"linear_1.weight": ("matrix", OUT), "linear_2.weight": ("output", IN)},
    ),
    "DiTTransformer2DModel": (
        {"proj_out_1": nn.Linear(IN, 2 * IN), "proj_out_2": nn.Linear(IN, OUT)},
        {"proj_out_1.weight": ("matrix", IN), "proj_out_2.weight": ("output", IN)},
    ),
    "SD3Transformer2DModel": (
        {
            "pos_embed": nn.Sequential(OrderedDict(proj=nn.Conv2d(16, IN, 2, 2))),
            "time_text_embed": nn.Sequential(
                OrderedDict(
                    timestep_embedder=linears(linear_1=(8, IN), linear_2=(IN, IN)),
                    text_embedder=named(
                        "PixArtAlphaTextProjection", linear_1=nn.Linear(9, IN), linear_2=nn.Linear(IN, IN)
                    ),
                )
            ),
            "context_embedder": nn.Linear(11, IN),
            "proj_out": nn.Linear(IN, OUT),
        },
        {
            "pos_embed.proj.weight": ("vector", None),
            "time_text_embed.timestep_embedder.linear_1.weight": ("vector", None),
            "time_text_embed.timestep_embedder.linear_2.weight": ("matrix", IN),
            "time_text_embed.text_embedder.linear_1.weight": ("vector", None),
            "time_text_embed.text_embedder.linear_2.weight": ("matrix", IN),
            "context_embedder.weight": ("vector", None),
            "proj_out.weight": ("output", IN),
        },
    ),
    "TimestepEmbedder": (
        {"mlp": nn.Sequential(nn.Linear(8, IN), nn.SiLU(), nn.Linear(IN, IN))},
        {"mlp.0.weight": ("vector", None), "mlp.2.weight": ("matrix", IN)},
    ),
    "UNet2DConditionModel": (
        convolutions(9, 4),
        {"conv_in.weight": ("vector", None), "middle.weight": ("matrix", 72), "conv_out.weight": ("output", 72)},
    ),
    "TimesFmModel": (
        {"input_ff_layer": linears(input_layer=(4, 8), output_layer=(8, 8), residual_layer=(4, 8))},
        {
            "input_ff_layer.input_layer.weight": ("vector", None),
            "input_ff_layer.output_layer.weight": ("matrix", 8),
            "input_ff_layer.residual_layer.weight": ("vector", None),
        },
    ),
    # The stem of three channels embeds the image, and the later stages read it.
    "CoaT": (
        {f"patch_embed{i}": nn.Sequential(OrderedDict(proj=nn.Conv2d(n, 8, 2, 2))) for i, n in ((1, 3), (2, 16))},
        {"patch_embed1.proj.weight": ("vector", None), "patch_embed2.proj.weight": ("matrix", 64)},
    ),
    "DistilBertForSequenceClassification": (
        {"pre_classifier": nn.Linear(IN, OUT), "classifier": nn.Linear(OUT, 2)},
        {"pre_classifier.weight": ("matrix", IN), "classifier.weight": ("output", OUT)},
    ),
    "SelecSls": (
        {"head": nn.Sequential(nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)))},
        {"head.0.0.weight": ("matrix", 72)},
    ),
    "timm.models.volo:PatchEmbed": ({"proj": nn.Conv2d(8, 16, 4, 4)}, {"proj.weight": ("matrix", 128)}),
    "WhisperEncoder": (
        {"conv1": nn.Conv1d(80, 8, 3), "conv2": nn.Conv1d(8, 8, 3)},
        {"conv1.weight": ("vector", None), "conv2.weight": ("matrix", 24)},
    ),
    "SiglipMultiheadAttentionPoolingHead": (
        {"attention": nn.MultiheadAttention(8, 2), "mlp": linears(fc1=(8, 16), fc2=(16, 8))},
        {
            "attention.in_proj_weight": ("matrix", 8),
            "attention.out_proj.weight": ("matrix", 8),
            "mlp.fc1.weight": ("matrix", 8),
            "mlp.fc2.weight": ("matrix", 16),
        },
    ),
    "ModernBertPredictionHead": ({"dense": nn.Linear(IN, IN)}, {"dense.weight": ("matrix", IN)}),
    "SiglipTextModel": ({"head": nn.Linear(IN, OUT)}, {"head.weight": ("matrix", IN)}),
    "JanusVQVAEHead": (
        {"proj_out": nn.Linear(IN, OUT), "vision_head": nn.Linear(OUT, 4)},
        {"proj_out.weight": ("matrix", IN), "vision_head.weight": ("output", OUT)},
    ),
    "DINOHead": (
        {
            "mlp": nn.Sequential(nn.Linear(IN, OUT)),
            "last_layer": nn.utils.parametrizations.weight_norm(nn.Linear(OUT, 4)),
        },
        {
            "mlp.0.weight": ("matrix", IN),
            "last_layer.parametrizations.weight.original0": ("vector", None),
            "last_layer.parametrizations.weight.original1": ("output", OUT),
        },
    ),
    "ZayaRouterMLP": (
        {"fc1": nn.Linear(IN, IN), "out_proj": nn.Linear(IN, 4)},
        {"fc1.weight": ("matrix", IN), "out_proj.weight": ("output", IN)},
    ),
    "deepspeed.moe.layer:MoE": (
        {"coefficient": nn.Linear(IN, 2), "mlp": nn.Linear(IN, IN)},
        {"coefficient.weight": ("output", IN), "mlp.weight": ("matrix", IN)},
    ),
}


# The name of a head stands before these, and does not count.
IN_A_HEAD = (
    "SiglipMultiheadAttentionPoolingHead",
    "ModernBertPredictionHead",
    "FinalLayer",
    "JanusVQVAEHead",
)


@pytest.mark.parametrize(("place", "key"), [("block", key) for key in MODULES] + [("head", key) for key in IN_A_HEAD])
def test_layers_of_a_known_class_have_their_roles_and_fan_ins(place: str, key: str) -> None:
    children, roles = MODULES[key]
    model = nn.Module()
    model.add_module(place, module := named(key, **children))
    assert known_roles(type(module))
    found = {d.name.removeprefix(f"{place}."): d for d in decide(model, {}) if d.param.ndim > 1}
    assert {name: (d.decision.role, d.fan_in) for name, d in found.items()} == roles
