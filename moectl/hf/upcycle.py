"""A Hugging Face model's MLPs replaced by experts, in place: ``moectl.hf.upcycle``.

Everything else of the model stays what it is, bit for bit: attention, embeddings, norms, generation. The
mask of real tokens reaches the experts so: a pre-hook of the backbone turns ``attention_mask`` into the
keyword ``moe_token_mask``, transformers hands it through every layer to its attention, a pre-hook there
takes it off again and leaves it with the MoE layer beside. It travels as an argument because activation
checkpointing runs a layer a second time, after other calls of the model, and then runs inner hooks only.

Shape suffixes: B batch, S new positions, C all positions, D hidden, E experts, P tokens of a prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moectl.config.schema import MoEConfig
from moectl.errors import ConfigError
from moectl.hf.dense import DenseFamily, family_of
from moectl.models.config import resolve_layers
from moectl.models.decoder import CAPACITY_OPTIONS, GatedMLP
from moectl.models.modes import eval_mode
from moectl.moe.capacity import Capacity
from moectl.moe.experts import Experts, GatedExperts, MLPExperts
from moectl.moe.filling import check_donors, check_layer, fill_layer
from moectl.moe.layer import MoELayer
from moectl.moe.shared import PlainMLP
from moectl.moe.upcycle import hidden_rows
from moectl.routers import build_router

MASK = "moe_token_mask"


def upcycle(
    model: Any,
    moe: MoEConfig,
    *,
    generator: torch.Generator | None = None,
    experts: Sequence[Any] = (),
    prompts: Sequence[Sequence[Tensor]] = (),
) -> Any:
    """Replace the chosen MLPs of a transformers model by MoE layers, in place, and return the model.

    ``init: auto`` is ``copy``: the base is trained. Gates and ``random`` experts are drawn from torch's global
    generator. Nothing is changed unless everything can be.

    Args:
        model: a causal language model of the family gpt2, llama (also mistral), qwen2 or qwen3.
        moe: see :class:`moectl.config.MoEConfig`.
        generator: a CPU generator for noise, parts and redrawn neurons.
        experts: for ``init: experts-from``, fine-tunes of the base, one per expert.
        prompts: for ``init: experts-from``, token ids ``[P]`` of some texts per expert: each gate row then
            starts from the base's hidden states of that expert's texts.

    Raises:
        ConfigError: a family, MLP, layer list or router that cannot be upcycled, naming the part.
    """
    moe = moe.model_copy(update={"init": "copy"}) if moe.init == "auto" else moe
    family, numbers = check_upcycling(model, moe, experts)
    config, layers = model.config, family.layers_of(model)
    dense = {n: family.mlp_of(layers[n], f"layer {n}") for n in numbers}
    donors = {
        n: [family.layout_of(getattr(family.layers_of(each)[n], family.mlp)) for each in experts] for n in numbers
    }
    made = {n: new_layer(moe, family, config, n) for n in numbers}
    rows = _rows(model, family, prompts, numbers, moe)
    for number, layer in made.items():
        source = next(dense[number].parameters())
        layer.to(device=source.device, dtype=source.dtype)
        fill_layer(
            layer,
            family.layout_of(dense[number]),
            moe,
            generator=generator,
            experts=donors[number],
            rows=rows.get(number),
        )
    install(model, family, moe, made)
    return model


def check_upcycling(model: Any, moe: MoEConfig, experts: Sequence[Any] = ()) -> tuple[DenseFamily, tuple[int, ...]]:
    """Refuse what :func:`upcycle` cannot do, at no cost: layers are tried on the meta device.

    Returns:
        The model's family, and the numbers of the layers that get experts.

    Raises:
        ConfigError: see :func:`upcycle`.
    """
    family = family_of(model)
    if upcycled_with(model) is not None:
        raise ConfigError("the model has experts already", "Upcycle a dense model, or grow this one.")
    config, layers = model.config, family.layers_of(model)
    numbers = resolve_layers(moe.layers, len(layers))
    for number in numbers:
        family.mlp_of(layers[number], f"layer {number}")
        with torch.device("meta"):
            layer = new_layer(moe, family, config, number)
        check_layer(layer, moe, family.mlp_size(config))
    check_donors(
        moe, [_fine_tuned(family, config, other) for other in experts], "its family, shape or activation differs"
    )
    for name, other in zip(moe.experts_from, experts, strict=False):
        if upcycled_with(other) is not None:
            raise ConfigError(f"'{name}' has experts already", "Each expert comes from a dense model.")
        for number in numbers:
            family.mlp_of(family.layers_of(other)[number], f"layer {number} of '{name}'")
    return family, numbers


def install(model: Any, family: DenseFamily, moe: MoEConfig, made: Mapping[int, MoELayer]) -> None:
    """Put MoE layers in the places of dense MLPs and see to it that they are told which tokens are real."""
    layers = family.layers_of(model)
    for number, layer in made.items():
        layer.train(layers[number].training)
        setattr(layers[number], family.mlp, layer)
        attention = getattr(layers[number], family.attention)
        # In a tuple: the layer is no part of the attention, but a deep copy of the model links the copies.
        attention.__dict__["moectl_layers"] = (layer,)
        attention.register_forward_pre_hook(_leave_mask, with_kwargs=True)
        layer.__dict__["handed_mask"] = None
        layer.register_forward_pre_hook(_take_mask, with_kwargs=True)
    family.backbone_of(model).register_forward_pre_hook(_mask_from_attention, with_kwargs=True)
    model.moectl_moe = moe


def upcycled_with(model: Any) -> MoEConfig | None:
    """What a model was upcycled with; None for a dense one."""
    found = getattr(model, "moectl_moe", None)
    return found if isinstance(found, MoEConfig) else None


def new_layer(moe: MoEConfig, family: DenseFamily, config: Any, number: int) -> MoELayer:
    """A fresh MoE layer for layer ``number``, in the shape of the family's dense MLPs.

    Raises:
        ConfigError: an activation that experts have not, a router that cannot be built, a capacity for a router
            whose tokens do not choose.
    """
    hidden, activation = int(config.hidden_size), family.activation_of(config)
    size = moe.expert_size(family.mlp_size(config))
    router = build_router(moe.router_name, hidden_size=hidden, num_experts=moe.num_experts, **moe.router_options)
    router.label = f"layer {number}'s router '{moe.router_name}'"
    experts: Experts
    shared: nn.Module | None = None
    if activation == "swiglu":
        experts = GatedExperts(moe.num_experts, hidden, size, backend=moe.backend)
    else:
        experts = MLPExperts(moe.num_experts, hidden, size, backend=moe.backend, activation=activation)
    std = float(getattr(config, "initializer_range", 0.02))
    experts.reset_parameters(std, std / (2 * config.num_hidden_layers) ** 0.5)
    if moe.n_shared_experts:
        shared = (GatedMLP if activation == "swiglu" else PlainMLP)(hidden, size * moe.n_shared_experts)
        for name, parameter in shared.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std)
    options = None if moe.capacity is None else moe.capacity.model_dump(include=CAPACITY_OPTIONS)
    capacity = None if options is None else Capacity(**options)
    return MoELayer(router, experts, shared, capacity, dropout=family.dropout_of(config))


# --- several models, and texts


def _fine_tuned(family: DenseFamily, config: Any, other: Any) -> bool:
    """Whether ``other`` is of this family, shape and activation."""
    return (
        family_of(other) is family
        and family.shape_of(other.config) == family.shape_of(config)
        and family.activation_of(other.config) == family.activation_of(config)
    )


def _rows(
    model: Any, family: DenseFamily, prompts: Sequence[Sequence[Tensor]], numbers: Sequence[int], moe: MoEConfig
) -> dict[int, Tensor]:
    """Gate rows ``[E, D]`` of every chosen layer; none without prompts."""
    if not prompts:
        return {}
    if moe.init != "experts-from" or len(prompts) != moe.num_experts:
        raise ConfigError(
            f"texts for {len(prompts)} experts were given, but moe.init is {moe.init} with {moe.num_experts}",
            "Give texts for each expert of moe.init: experts-from, or none.",
        )
    sums: dict[int, list[Tensor]] = {number: [] for number in numbers}
    for number_of_expert, texts in enumerate(prompts):
        if not sum(text.numel() for text in texts):
            raise ConfigError(f"the text for expert {number_of_expert} is empty", "Give each expert some text.")
        for number, inputs in mlp_inputs(model, family, texts, numbers).items():
            sums[number].append(inputs.mean(0))
    try:
        return {number: hidden_rows(torch.stack(means)) for number, means in sums.items()}
    except ValueError as error:
        raise ConfigError(str(error), "Give each expert a text of its own kind (moe.router_prompts).") from error


def mlp_inputs(model: Any, family: DenseFamily, texts: Iterable[Tensor], numbers: Iterable[int]) -> dict[int, Tensor]:
    """What some layers' MLPs are given for ``texts`` (ids ``[P]`` each): ``[all tokens, D]``, float32 or above."""
    layers = family.layers_of(model)
    seen: dict[int, list[Tensor]] = {number: [] for number in numbers}

    def listen(number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            seen[number].append(x if x.dtype == torch.float64 else x.float())

        return getattr(layers[number], family.mlp).register_forward_pre_hook(hook)

    handles = [listen(number) for number in seen]
    try:
        with eval_mode(model):
            for ids in texts:
                if ids.numel():
                    family.backbone_of(model)(input_ids=ids[None].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {number: torch.cat(parts) for number, parts in seen.items()}


# --- the mask's way


def _mask_from_attention(
    backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if MASK in kwargs:  # said by the caller
        return None
    given = _given(backbone, args, kwargs)
    inputs = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    mask = given.get("attention_mask")
    if inputs is None or mask is None:
        return None
    cache = given.get("past_key_values")
    token_mask = real_tokens(mask, inputs.shape[1], 0 if cache is None else cache.get_seq_length())
    return args, {**kwargs, MASK: token_mask}


def real_tokens(attention_mask: Any, length: int, past: Any) -> Tensor | None:
    """``[B, S]`` bool: which of the ``length`` newest tokens are no padding; None where that is not said.

    Args:
        attention_mask: ``[B, C]``; or, as generation with a static cache prepares it, ``[B, 1, S, C]`` (bool, or
            0 where attention is allowed), also by kind of layer: padding is what may not see itself.
        past: positions before.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention")
    if not isinstance(attention_mask, Tensor):
        return None
    if attention_mask.dim() == 2:
        return attention_mask[:, -length:].bool() if attention_mask.shape[1] >= length else None
    if attention_mask.dim() != 4:
        return None
    itself = torch.arange(length, device=attention_mask.device) + past
    if attention_mask.shape[-1] < length + int(past):
        return None
    allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    return allowed[:, 0, -length:].gather(-1, itself[None, :, None].expand(allowed.shape[0], -1, 1)).squeeze(-1)


def _given(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in inspect.signature(module.forward).parameters if name != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _leave_mask(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for layer in attention.__dict__["moectl_layers"]:
        layer.__dict__["handed_mask"] = kwargs.get(MASK)
    return args, {key: value for key, value in kwargs.items() if key != MASK}


def _take_mask(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if len(args) > 1 or "token_mask" in kwargs:
        return None
    # Taken, not read: a layer that is called by itself afterwards has no mask.
    mask, layer.__dict__["handed_mask"] = layer.__dict__["handed_mask"], None
    return args, {**kwargs, "token_mask": mask}
