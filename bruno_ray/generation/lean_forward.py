"""The forward pass of llama-like models on one device, without what transformers' own does around it.

A step of a small batch is short, and half of it is spent between the matrix products: a dozen operations for each
rotation and norm, masks built and converted in every layer, keys and values repeated for grouped heads. On a GPU the
time goes into starting them. Here

* queries, keys and values come from one product, gate and up from another. The fused weights take no memory of their
  own: the model's parameters become views of them;
* on a CPU float32 weights lie in memory column by column, which makes products with few rows a tenth to a quarter
  faster;
* in bfloat16 on a CPU the weights are packed beforehand, as oneDNN's products want them (``packed.py``);
* queries and keys are rotated together, in three operations;
* the mask is made once, in the form that attention adds;
* in bfloat16 on a CPU the query heads that share keys attend as further tokens of one head. torch's kernel is slow with
  one query: 100 rows of SmolLM2 took 7.2 ms a layer and take 2.1, beside 4.2 for all products.

The modules that write to the residual stream are called as modules, so that hooks on them work. ``lean_forward`` gives
None for models of other kinds, and for one whose logits it does not reproduce. Queries, keys, values, gate and up are
not called, so whoever edits what they read (``LiveEditor.edits_inputs``) computes with the model itself.

Axes: B rows, T tokens, C columns (with those of the cache), H heads, K key-value heads, D head size, V vocabulary.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from bruno_ray.generation.packed import called, linear, packs

logger = logging.getLogger(__name__)

FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Model types whose blocks are computed below; all others are left to transformers."""

DTYPES = {"cpu": {torch.float32, torch.bfloat16}, "cuda": {torch.float32, torch.float16, torch.bfloat16}}
"""Where it is used. All parameters are of one dtype, on one device."""

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""For the comparison at the start, see `difference_from_model`; a wrong formula is off by tens of percent. In bfloat16
two right ones differ by 1 to 2 % (SmolLM2, 30 layers, unedited and edited), at single positions by more than that:
where a text begins without its first token, either may be far from float32."""


def lean_forward(model: nn.Module) -> "LeanForward | None":
    """The lean form of ``model``, or None if it has to compute for itself. Call it when all hooks are in place."""
    if not _is_known(model):
        return None
    with torch.inference_mode(False):  # in which weights would be made that do not know when they are changed
        lean = LeanForward(model)
    with torch.inference_mode():
        difference = lean.difference_from_model()
    if not difference <= TOLERANCE[model.dtype]:
        logger.warning("a lean forward pass of %s differs by %.1e: it is not used", model.config.model_type, difference)
        return None
    return lean


def own_forward(
    model: nn.Module,
    ids_BT: Int[Tensor, "B T"],
    mask_BC: Int[Tensor, "B C"],
    positions_BT: Int[Tensor, "B T"],
    cache: DynamicCache | None,
    keep: int,
) -> Float[Tensor, "B keep V"]:
    """What ``LeanForward`` gives, computed by the model itself."""
    output = model(
        input_ids=ids_BT,
        attention_mask=mask_BC,
        position_ids=positions_BT,
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=keep,
    )
    return output.logits[:, -keep:]


class LeanForward:
    """See above."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._trunk = model.model
        pack = packs(model)
        self._blocks = [_Block(layer, i, pack) for i, layer in enumerate(model.model.layers)]
        self._norm = _Norm(model.model.norm)
        self._head = called(model.lm_head, pack)

    def __call__(
        self,
        ids_BT: Int[Tensor, "B T"],
        mask_BC: Int[Tensor, "B C"],
        positions_BT: Int[Tensor, "B T"],
        cache: DynamicCache | None,
        keep: int,
    ) -> Float[Tensor, "B keep V"]:
        """Logits at the last ``keep`` positions, or all if there are fewer.

        Row b sees the columns where its mask is not 0, up to its own.
        """
        x_BTd = F.embedding(ids_BT, self._trunk.embed_tokens.weight)
        cos_BTD, sin_BTD = self._trunk.rotary_emb(x_BTd, positions_BT)
        half = sin_BTD.shape[-1] // 2
        # rotate_half(x) * sin = swapped halves of x * (-sin, sin)
        signed_BTD = torch.cat([-sin_BTD[..., :half], sin_BTD[..., half:]], dim=-1)
        rotation = cos_BTD[:, :, None], signed_BTD[:, :, None]
        n_tokens = ids_BT.shape[1]
        bias_B1TC = _bias(mask_BC, n_tokens, x_BTd.dtype)
        for block in self._blocks[:-1]:
            x_BTd = block(x_BTd, rotation, bias_B1TC, cache, n_tokens)
        # Of the other tokens, the last layer leaves only its keys and values.
        return self._head(self._norm(self._blocks[-1](x_BTd, rotation, bias_B1TC, cache, min(keep, n_tokens))))

    def difference_from_model(self) -> float:
        """How much logits differ, relative to their size (root mean squares), at the middle one of a row's positions.

        The largest of padded rows that are read with and without a cache.
        """
        vocabulary, device = self._trunk.embed_tokens.weight.shape[0], self._trunk.embed_tokens.weight.device
        ids_BT = torch.arange(1, 11, device=device).view(2, 5) * (vocabulary // 12)  # few of them are special tokens
        mask_BC = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], device=device)
        positions_BT = (mask_BC.cumsum(-1) - 1).clamp(min=0)
        wanted = own_forward(self._model, ids_BT, mask_BC, positions_BT, None, 3)
        whole = self(ids_BT, mask_BC, positions_BT, None, 3)
        cache = DynamicCache(config=self._model.config)
        pieces = [
            self(ids_BT[:, a:b], mask_BC[:, :b], positions_BT[:, a:b], cache, b - max(a, 2))
            for a, b in ((0, 3), (3, 5))
        ]
        shares_BT = [_size(found - wanted) / _size(wanted) for found in (whole, torch.cat(pieces, dim=1))]
        return float(torch.stack(shares_BT).median(-1).values.max())


def _size(logits_BTV: Float[Tensor, "B T V"]) -> Float[Tensor, "B T"]:
    return logits_BTV.float().square().mean(-1).sqrt()


class _Norm:
    """An RMS norm as one operation."""

    def __init__(self, module: nn.Module) -> None:
        self._weight = module.weight
        self._eps = module.variance_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self._weight.shape, self._weight, self._eps)


class _Block:
    """One layer: attention and MLP."""

    def __init__(self, layer: nn.Module, index: int, pack: bool) -> None:
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        self._index = index
        self._norms = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self._qkv = linear(*_fused(attention.q_proj, attention.k_proj, attention.v_proj), pack)
        self._gate_up = linear(*_fused(mlp.gate_proj, mlp.up_proj), pack)
        self._head_norms = (_Norm(attention.q_norm), _Norm(attention.k_norm)) if hasattr(attention, "q_norm") else None
        self._size, self._scale = attention.head_dim, attention.scaling
        self._heads = attention.q_proj.out_features // self._size
        self._kv_heads = attention.k_proj.out_features // self._size
        self._activation = mlp.act_fn
        for module in (attention.o_proj, mlp.down_proj):
            if type(module) is nn.Linear:
                module.weight = nn.Parameter(_by_columns(module.weight.detach()), requires_grad=False)
        self._out, self._down = (called(module, pack) for module in (attention.o_proj, mlp.down_proj))

    def __call__(
        self,
        x_BTd: Tensor,
        rotation: tuple[Float[Tensor, "B T 1 D"], Float[Tensor, "B T 1 D"]],
        bias_B1TC: Float[Tensor, "B 1 T C"],
        cache: DynamicCache | None,
        keep: int,
    ) -> Tensor:
        """The residual stream behind the layer at the last ``keep`` positions."""
        seen_BTd = self._attend(self._norms[0](x_BTd), rotation, bias_B1TC, cache, keep)
        x_BTd = x_BTd[:, -keep:] + self._out(seen_BTd)
        gate, up = self._gate_up(self._norms[1](x_BTd)).chunk(2, dim=-1)
        return x_BTd + self._down(self._activation(gate).mul_(up))

    def _attend(
        self, x_BTd: Tensor, rotation: tuple[Tensor, Tensor], bias_B1TC: Tensor, cache: DynamicCache | None, keep: int
    ) -> Tensor:
        (B, T), (cos, signed) = x_BTd.shape[:2], rotation
        qkv_BTHD = self._qkv(x_BTd).view(B, T, -1, self._size)
        qk_BTHD, values_BTKD = qkv_BTHD.split([self._heads + self._kv_heads, self._kv_heads], dim=2)
        if self._head_norms is not None:
            parts = qk_BTHD.split([self._heads, self._kv_heads], dim=2)
            qk_BTHD = torch.cat([norm(part) for norm, part in zip(self._head_norms, parts)], dim=2)
        swapped_BTHD = qk_BTHD.roll(self._size // 2, dims=-1)
        rotated_BHTD = torch.addcmul(qk_BTHD * cos, swapped_BTHD, signed).transpose(1, 2)
        queries_BHTD, keys_BKCD = rotated_BHTD.split([self._heads, self._kv_heads], dim=1)
        values_BKCD = values_BTKD.transpose(1, 2)
        if cache is not None:
            keys_BKCD, values_BKCD = cache.layers[self._index].update(keys_BKCD, values_BKCD)
        queries_BHTD, bias_B1TC = queries_BHTD[:, :, -keep:], bias_B1TC[:, :, -keep:]
        groups = self._heads // self._kv_heads
        if grouped := groups > 1 and x_BTd.dtype == torch.bfloat16 and x_BTd.device.type == "cpu":
            queries_BHTD = queries_BHTD.reshape(B, self._kv_heads, groups * keep, self._size)
            bias_B1TC = bias_B1TC.repeat(1, 1, groups, 1)
        seen_BHTD = F.scaled_dot_product_attention(
            queries_BHTD,
            keys_BKCD,
            values_BKCD,
            attn_mask=bias_B1TC,
            scale=self._scale,
            enable_gqa=groups > 1 and not grouped,
        )
        return seen_BHTD.reshape(B, -1, keep, seen_BHTD.shape[-1]).transpose(1, 2).reshape(B, keep, -1)


def _bias(mask_BC: Tensor, n_tokens: int, dtype: torch.dtype) -> Float[Tensor, "B 1 T C"]:
    """0 where a token may look and the least number elsewhere: padding, which may look nowhere, stays finite."""
    seen_B1TC = mask_BC.bool()[:, None, None]
    if n_tokens > 1:
        columns = torch.arange(mask_BC.shape[1], device=mask_BC.device)
        seen_B1TC = seen_B1TC & (columns <= columns[-n_tokens:, None])
    return torch.zeros(seen_B1TC.shape, dtype=dtype, device=mask_BC.device).masked_fill_(
        ~seen_B1TC, torch.finfo(dtype).min
    )


def _fused(*modules: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of maps of one input, one below the other; the modules' own become views of them."""
    weight = _by_columns(torch.cat([module.weight.detach() for module in modules]))
    for module, view in zip(modules, weight.split([module.out_features for module in modules])):
        module.weight = nn.Parameter(view, requires_grad=False)
    if modules[0].bias is None:
        return weight, None
    return weight, torch.cat([module.bias.detach() for module in modules])


def _by_columns(weight: Tensor) -> Tensor:
    """The same matrix, in float32 on a CPU with its columns and not its rows next to each other in memory."""
    return weight.t().contiguous().t() if weight.device.type == "cpu" and weight.dtype == torch.float32 else weight


def _is_known(model: nn.Module) -> bool:
    """Whether the blocks are those computed here, with plain weights and no hook on what is not called as a module."""
    config = model.config
    if config.model_type not in FAMILIES:
        return False
    if (getattr(config, "sliding_window", None) or config.max_position_embeddings) < config.max_position_embeddings:
        return False
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return False
    kinds = {(parameter.device, parameter.dtype) for parameter in model.parameters()}
    if len(kinds) > 1 or any(d.type not in DTYPES or dtype not in DTYPES[d.type] for d, dtype in kinds):
        return False
    called = {model.lm_head}
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        maps = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
        if any(type(module) is not nn.Linear for module in maps):
            return False
        called |= {attention.o_proj, mlp.down_proj}
    return not any(
        module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
        for module in model.modules()
        if module not in called
    )
