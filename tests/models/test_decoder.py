"""The decoder: names, causality, padding, document boundaries, cached decoding, generation.

What it computes is compared with transformers' Qwen3-MoE in test_against_transformers.py.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moectl.models.cache import KVCache
from moectl.models.decoder import (
    Decoder,
    GatedMLP,
    RMSNorm,
    attention_mask,
    choose_token,
    rope_tables,
    rotate,
)
from moectl.moe import MoELayer
from moectl.moe.capacity import Capacity
from tests.models.conftest import VOCABULARY, MakeDecoder, build

# Activations of order ten, three layers; the same sums over other shapes and positions, in float64.
FLOAT64 = 1e-10


def some_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=FLOAT64)


# --- names and parameters


def test_parameter_names_are_qwen3_moes(make_decoder: MakeDecoder) -> None:
    attention = ["q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"]
    layer = [f"self_attn.{name}.weight" for name in attention]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    dense = [f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    moe = ["mlp.router.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    moe += [f"mlp.shared_experts.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    expected = {"embed_tokens.weight", "norm.weight"}
    expected |= {f"layers.0.{name}" for name in layer + dense}
    expected |= {f"layers.{number}.{name}" for number in (1, 2) for name in layer + moe}
    model = make_decoder("top1")
    assert {name for name, _ in model.named_parameters()} == expected
    buffers = {f"layers.{n}.mlp.router.noise.{name}" for n in (1, 2) for name in ("step", "anneal_steps")}
    assert model.state_dict().keys() == expected | buffers | {"lm_head.weight"}
    assert list(model.moe_layers()) == [1, 2]
    assert all(isinstance(layer, MoELayer) for layer in model.moe_layers().values())


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_or_not_and_stay_so(make_decoder: MakeDecoder, tied: bool) -> None:
    model = make_decoder(tie_word_embeddings=tied)
    for same in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.float32)):
        assert (same.lm_head.weight is same.embed_tokens.weight) == tied
    untied = sum(p.numel() for p in make_decoder(tie_word_embeddings=False).parameters())
    assert sum(p.numel() for p in model.parameters()) == untied - (VOCABULARY * 16 if tied else 0)


def test_initial_scale() -> None:
    """Normal(0, 0.02), what writes to the residual stream by √(2L) smaller. 5 % is over five standard errors."""
    from moectl.config.schema import MoEConfig
    from moectl.models.config import DecoderConfig

    torch.manual_seed(0)
    shape = DecoderConfig(vocab_size=400, hidden_size=64, intermediate_size=64, num_layers=2)
    model = Decoder(shape.with_moe(MoEConfig(layers="1", num_experts=4)))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif "router" not in name:
            writes = "o_proj" in name or "down_proj" in name
            assert parameter.std().item() == pytest.approx(0.01 if writes else 0.02, rel=0.05), name


def test_every_parameter_gets_a_gradient(decoder: Decoder) -> None:
    decoder.train()
    ids = some_ids(4, 12)
    decoder.lm_loss_sum(ids[:, :-1], ids[:, 1:]).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        assert parameter.grad.isfinite().all(), name


# --- what the config says of the experts


@pytest.mark.parametrize("overflow", ["drop", "next-best"])
def test_capacity_of_the_config_is_the_layers_in_training_and_nowhere_else(overflow: str) -> None:
    given = {"factor": 0.5, "overflow": overflow, "fill": "probability"}
    free, limited = build("top2"), build("top2", capacity=given)
    for layer in limited.moe_layers().values():
        assert layer.capacity == Capacity(0.5, overflow=overflow, fill="probability")  # type: ignore[arg-type]
        assert not layer.causal
    limited.load_state_dict(free.state_dict())
    ids = some_ids(2, 8)
    assert torch.equal(limited(ids), free(ids)), "dropless in eval"
    assert all(layer.dropped is None for layer in limited.moe_layers().values())
    limited.train()(ids)
    for layer in limited.moe_layers().values():  # room for ceil(2·16/4·0.5) = 4 in each of 4 experts: half of 32 slots
        assert layer.dropped is not None
        assert layer.dropped.sum() >= 16
    in_eval = build("top2", capacity={**given, "in_eval": True})
    in_eval(ids)
    assert all(layer.dropped is not None for layer in in_eval.moe_layers().values())


def test_a_router_says_which_layer_it_is_in(make_decoder: MakeDecoder) -> None:
    model = make_decoder("top2")
    labels = [layer.router.label for layer in model.moe_layers().values()]
    assert labels == ["layer 1's router 'top2'", "layer 2's router 'top2'"]
    assert copy.deepcopy(model).moe_layers()[2].router.label == labels[1]


# --- who may see whom


def test_later_tokens_change_nothing_earlier(decoder: Decoder) -> None:
    """Earlier logits stay, and those of the changed position do not: otherwise the first half would be free."""
    ids = some_ids(2, 9)
    before = decoder(ids)
    for position in range(1, 9):
        changed = ids.clone()
        changed[:, position:] = some_ids(2, 9 - position, seed=position + 100)
        changed[:, position] = ids[:, position] % (VOCABULARY - 1) + 1
        after = decoder(changed)
        close(after[:, :position], before[:, :position])
        assert (after[:, position] - before[:, position]).abs().max() > 1e-3


def test_expert_choice_does_let_later_tokens_in(make_decoder: MakeDecoder) -> None:
    """What the declaration ``causal = False`` is about, and what its threshold form (above) is free of."""
    ids = some_ids(2, 9)
    changed = ids.clone()
    changed[:, 5:] = some_ids(2, 4, seed=9)
    model = make_decoder("expert-choice")
    assert not any(layer.causal for layer in model.moe_layers().values())
    assert (model(changed)[:, :5] - model(ids)[:, :5]).abs().max() > 1e-3


def test_rows_of_a_batch_do_not_meet(decoder: Decoder) -> None:
    ids = some_ids(3, 7)
    together = decoder(ids)
    for row in range(3):
        close(together[row], decoder(ids[row : row + 1])[0])


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_on_either_side_changes_no_real_logit(decoder: Decoder, side: str) -> None:
    """Three rows of different length in one batch, whatever ids stand in the padding."""
    lengths, width = (4, 7, 1), 9
    batch, mask = some_ids(3, width, seed=5), torch.zeros(3, width, dtype=torch.bool)
    rows = [some_ids(length, seed=length) for length in lengths]
    for row, ids in enumerate(rows):
        space = width - len(ids)
        start = {"left": space, "right": 0, "both": space // 2}[side]
        batch[row, start : start + len(ids)] = ids
        mask[row, start : start + len(ids)] = True
    logits = decoder(batch, token_mask=mask)
    assert logits.isfinite().all(), "a row of attention over nothing would be NaN"
    for row, ids in enumerate(rows):
        close(logits[row][mask[row]], decoder(ids[None])[0])


def test_padding_counts_in_no_routing(make_decoder: MakeDecoder) -> None:
    model, mask = make_decoder("top2"), torch.tensor([[False, False, True, True, True]])
    model(some_ids(1, 5), token_mask=mask)
    for layer in model.moe_layers().values():
        assert layer.routing is not None
        assert layer.routing.keep is not None
        assert layer.routing.keep.any(1).tolist() == mask[0].tolist()
        assert layer.token_mask is not None
        assert layer.token_mask.tolist() == mask[0].tolist()


def test_a_document_in_a_packed_block_is_as_if_alone(decoder: Decoder) -> None:
    """Attention stops at the boundary, and rotary positions only count by difference."""
    first, second, third = some_ids(4, seed=1), some_ids(6, seed=2), some_ids(1, seed=3)
    block = torch.cat([first, second, third])[None]
    docs = torch.tensor([[7] * 4 + [3] * 6 + [9]])
    logits = decoder(block, doc_ids=docs)
    for start, document in ((0, first), (4, second), (10, third)):
        close(logits[0, start : start + len(document)], decoder(document[None])[0])
    assert (logits - decoder(block)).abs().max() > 1e-3, "without document ids they do see each other"


def test_documents_and_padding_together(decoder: Decoder) -> None:
    first, second = some_ids(3, seed=1), some_ids(4, seed=2)
    block = torch.cat([some_ids(2), first, second, some_ids(1)])[None]
    docs = torch.tensor([[0] * 2 + [0] * 3 + [1] * 4 + [1]])
    mask = torch.tensor([[False] * 2 + [True] * 7 + [False]])
    logits = decoder(block, doc_ids=docs, token_mask=mask)
    close(logits[0, 2:5], decoder(first[None])[0])
    close(logits[0, 5:9], decoder(second[None])[0])


def test_gradients_do_not_cross_documents(make_decoder: MakeDecoder) -> None:
    model, ids = make_decoder("top2"), some_ids(1, 6)
    docs = torch.tensor([[0, 0, 0, 1, 1, 1]])
    seen: list[Tensor] = []

    def keep(module: object, args: object, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    model.embed_tokens.register_forward_hook(keep)
    model(ids, doc_ids=docs)[0, 3:].sum().backward()
    assert seen[0].grad is not None
    assert seen[0].grad[0].any(1).tolist() == [False, False, False, True, True, True]


def test_attention_mask_by_hand() -> None:
    cpu = torch.device("cpu")
    docs = torch.tensor([[0, 0, 1]])
    real = torch.tensor([[False, True, True]])

    def rows(mask: Tensor | None) -> list[list[int]]:
        assert mask is not None
        return mask[0, 0].int().tolist()

    assert rows(attention_mask(3, 0, docs, None, cpu)) == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert rows(attention_mask(3, 0, None, real, cpu)) == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert rows(attention_mask(3, 0, docs, real, cpu)) == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert rows(attention_mask(2, 2, None, None, cpu)) == [[1, 1, 1, 0], [1, 1, 1, 1]]
    half = torch.tensor([[False, True, False, True]])  # a padding query sees itself, cached positions before it or not
    assert rows(attention_mask(2, 2, None, half, cpu)) == [[0, 1, 1, 0], [0, 1, 0, 1]]
    assert attention_mask(3, 0, None, None, cpu) is None
    assert attention_mask(1, 5, None, None, cpu) is None


# --- cached decoding


@pytest.mark.parametrize("cuts", [[1] * 9, [9], [4, 1, 1, 3], [1, 8], [8, 1]], ids=str)
def test_cached_decoding_equals_the_full_forward(decoder: Decoder, cuts: list[int]) -> None:
    ids = some_ids(2, 9)
    cache, parts = KVCache(3), []
    for piece in ids.split(cuts, dim=1):
        parts.append(decoder(piece, cache=cache))
    assert cache.length == 9
    close(torch.cat(parts, dim=1), decoder(ids))


def test_a_cache_takes_no_documents(make_decoder: MakeDecoder) -> None:
    ids, model = some_ids(1, 3), make_decoder()
    with pytest.raises(ValueError, match="one document per row"):
        model(ids, doc_ids=torch.zeros_like(ids), cache=KVCache(3))


@pytest.mark.parametrize("cuts", [[1] * 9, [5, 1, 3], [2, 7]], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decoding_of_padded_rows_equals_each_row_alone(decoder: Decoder, side: str, cuts: list[int]) -> None:
    """Padding in the cache is attended to by nobody, in whichever piece it came."""
    ids, mask = some_ids(2, 9), torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    mask = mask.flip(1) if side == "right" else mask
    cache, parts, start = KVCache(3), [], 0
    for length in cuts:
        span = slice(start, start + length)
        parts.append(decoder(ids[:, span], token_mask=mask[:, span], cache=cache))
        start += length
    logits = torch.cat(parts, dim=1)
    for row in range(2):
        close(logits[row, mask[row]], decoder(ids[row, mask[row]][None])[0])


def test_a_mask_may_end_or_begin_with_any_piece(make_decoder: MakeDecoder) -> None:
    """A prompt with padding and then tokens without a mask, as generation feeds them; and the other way round."""
    model, ids = make_decoder("top2"), some_ids(1, 6)
    real = torch.tensor([[False, True, True]])
    cache = KVCache(3)
    model(ids[:, :3], token_mask=real, cache=cache)
    close(model(ids[:, 3:], cache=cache)[0], model(ids[:, 1:])[0, 2:])
    cache = KVCache(3)
    model(ids[:, :3], cache=cache)
    logits = model(ids[:, 3:], token_mask=real, cache=cache)
    there = torch.tensor([[0, 1, 2, 4, 5]])  # padding in the middle counts as a position
    close(logits[0, 1:], model(ids[:, [0, 1, 2, 4, 5]], positions=there)[0, 3:])


# --- positions


def test_positions_count_by_their_differences_only(decoder: Decoder) -> None:
    ids = some_ids(2, 7)
    shifted = torch.arange(7) + torch.tensor([[5], [40]])
    close(decoder(ids, positions=shifted), decoder(ids))
    gap = torch.tensor([[0, 1, 2, 3, 9, 10, 11]] * 2)
    assert (decoder(ids, positions=gap) - decoder(ids)).abs().max() > 1e-3
    close(decoder(ids, positions=gap)[:, :4], decoder(ids)[:, :4])


def test_positions_are_each_rows_own(make_decoder: MakeDecoder) -> None:
    model, ids = make_decoder("top2"), some_ids(2, 5)
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 2, 4, 6, 8]])
    together = model(ids, positions=positions)
    for row in range(2):
        close(together[row], model(ids[row : row + 1], positions=positions[row : row + 1])[0])
    assert (together[1] - model(ids)[1]).abs().max() > 1e-3


def test_loss_and_cache_take_positions(make_decoder: MakeDecoder) -> None:
    model, ids = make_decoder("top2"), some_ids(2, 6)
    labels, positions = ids.roll(-1, 1), torch.tensor([[0, 2, 3, 7, 8, 9], [3, 4, 5, 6, 8, 10]])
    logits = model(ids, positions=positions)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(model.lm_loss_sum(ids, labels, positions=positions), expected, rtol=1e-12, atol=0)
    cache, parts = KVCache(3), []
    for span in (slice(0, 4), slice(4, 6)):
        parts.append(model(ids[:, span], cache=cache, positions=positions[:, span]))
    close(torch.cat(parts, dim=1), logits)


def test_a_threshold_that_training_has_moved_decodes_like_the_full_forward(make_decoder: MakeDecoder) -> None:
    """Three steps of calibration, then token by token: the chosen experts are the same, and so are the logits."""
    model = make_decoder("threshold").train()
    before = {number: layer.router.threshold.clone() for number, layer in model.moe_layers().items()}
    for step in range(3):
        ids = some_ids(4, 9, seed=step)
        model.lm_loss_sum(ids[:, :-1], ids[:, 1:]).backward()
        for layer in model.moe_layers().values():
            assert layer.routing is not None and layer.routing.keep is not None
            layer.router.after_step(layer.routing.keep.sum(0))
    assert all(not torch.equal(layer.router.threshold, before[n]) for n, layer in model.moe_layers().items())
    model.eval()
    ids = some_ids(2, 9, seed=9)
    whole = model(ids)
    kept = {n: layer.routing.keep.view(2, 9, -1) for n, layer in model.moe_layers().items()}  # type: ignore[union-attr]
    assert all(keep.any() and not keep.all() for keep in kept.values()), "some experts take a token and some do not"
    cache = KVCache(3)
    for position in range(9):
        close(model(ids[:, position : position + 1], cache=cache)[:, 0], whole[:, position])
        for number, layer in model.moe_layers().items():
            assert torch.equal(layer.routing.keep, kept[number][:, position])  # type: ignore[union-attr]


# --- generation


def by_full_forward(model: Decoder, ids: Tensor, steps: int) -> Tensor:
    """Greedy continuation without a cache, every step from the beginning."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def test_greedy_generation_equals_the_full_forward(decoder: Decoder) -> None:
    decoder.config = copy.copy(decoder.config)
    object.__setattr__(decoder.config, "eos_token_id", -1)  # never ends early
    prompt = some_ids(3, 4)
    generated = decoder.generate(prompt, 6)
    assert torch.equal(generated, by_full_forward(decoder, prompt, 6))
    assert not generated.requires_grad


def test_greedy_choice_keeps_float64(make_decoder: MakeDecoder) -> None:
    """Two logits that differ by less than float32 can tell: the larger one wins, not the first."""
    model = make_decoder(tie_word_embeddings=False)
    hidden = model.hidden_states(some_ids(1, 2))[0, -1]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[3] = hidden / hidden.norm()
        model.lm_head.weight[8] = hidden / hidden.norm() * (1 + 1e-12)
    assert model.generate(some_ids(1, 2), 1)[0, -1].item() == 8


def test_generation_ends_where_every_row_has_ended(make_decoder: MakeDecoder) -> None:
    """A row that has ended goes on with the end token; once all have, nothing more is computed."""
    plain = make_decoder("top1")
    free = by_full_forward(plain, some_ids(2, 3), 8)[:, 3:]
    for end in free[0].tolist():  # an end token that stops one row and not (or later) the other
        places = [row.tolist().index(end) if end in row.tolist() else None for row in free]
        if places[0] != places[1]:
            break
    model = make_decoder("top1", eos_token_id=end)
    generated = model.generate(some_ids(2, 3), 8)[:, 3:]
    stops = [8 if place is None else place for place in places]
    assert stops[0] != stops[1]
    width = min(8, max(stops) + 1)
    assert generated.shape[1] == width
    for row, stop in enumerate(stops):
        assert generated[row, :stop].tolist() == free[row, :stop].tolist()
        assert generated[row, stop:].tolist() == [end] * (width - min(stop, width))


def test_generating_nothing_returns_the_prompt(make_decoder: MakeDecoder) -> None:
    prompt = some_ids(2, 3)
    assert torch.equal(make_decoder().generate(prompt, 0), prompt)


def test_sampling_is_reproducible_and_follows_the_generator(make_decoder: MakeDecoder) -> None:
    model, prompt = make_decoder(), some_ids(2, 3)

    def sample(seed: int) -> Tensor:
        return model.generate(prompt, 12, temperature=2.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": 1.0, "top_k": 0}], ids=str)
def test_senseless_sampling_is_refused(make_decoder: MakeDecoder, wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="temperature must be >= 0 and top_k >= 1"):
        make_decoder().generate(some_ids(1, 2), 1, **wrong)  # type: ignore[arg-type]


def test_sampled_tokens_follow_the_tempered_softmax_of_the_top_k() -> None:
    """20,000 draws against softmax(l / T) of the best three: 5 standard errors at most."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.0]]).expand(20_000, -1)
    drawn = choose_token(logits, 2.0, 3, torch.Generator().manual_seed(0))
    expected = torch.zeros(5)
    expected[1:4] = torch.softmax(torch.tensor([1.0, 2.0, 3.0]) / 2.0, dim=0)
    observed = drawn.bincount(minlength=5) / 20_000
    assert (observed - expected).abs().max() < 5 * 0.5 / math.sqrt(20_000)
    assert observed[[0, 4]].tolist() == [0.0, 0.0]
    assert choose_token(logits[:2], 0.0, None, None).tolist() == [3, 3]
    everything = choose_token(logits, 1.0, 99, torch.Generator().manual_seed(0))
    assert everything.unique().tolist() == [0, 1, 2, 3, 4], "top_k beyond the vocabulary is no limit"


# --- the loss


def test_summed_loss_equals_cross_entropy_of_the_logits(decoder: Decoder) -> None:
    ids, docs = some_ids(2, 8), torch.tensor([[0] * 5 + [1] * 3, [2] * 8])
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    labels[0, 4] = -100
    mask = torch.arange(8) < torch.tensor([[8], [6]])
    padded = F.cross_entropy(decoder(ids, docs, mask)[mask], labels[mask], ignore_index=-100, reduction="sum")
    torch.testing.assert_close(
        decoder.lm_loss_sum(ids, labels.masked_fill(~mask, -100), docs, mask), padded, rtol=1e-12, atol=0
    )
    expected = F.cross_entropy(
        decoder(ids, doc_ids=docs).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    loss = decoder.lm_loss_sum(ids, labels, docs)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    learning = [p for name, p in decoder.named_parameters() if "router" not in name]  # top1 in eval: a constant weight
    mine = torch.autograd.grad(loss, learning)
    theirs = torch.autograd.grad(expected, learning)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11 * max(1.0, other.abs().max().item()))


# --- parts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_by_hand(dtype: torch.dtype) -> None:
    norm = RMSNorm(2, eps=0.0).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0]))
    out = norm(torch.tensor([[3.0, 4.0]], dtype=dtype))
    assert out.dtype == dtype
    root = math.sqrt(12.5)
    tolerance = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    expected = torch.tensor([[3 / root, 8 / root]], dtype=torch.float64)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    assert RMSNorm(2, eps=1e-6)(torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]


def test_rms_norm_squares_in_float32() -> None:
    """In float16 the square of 300 is infinite."""
    assert RMSNorm(2, eps=0.0).half()(torch.full((1, 2), 300.0).half()).tolist() == [[1.0, 1.0]]


def test_rotation_turns_each_pair_by_its_angle() -> None:
    """Half-split pairs (i, i + P/2), turned by position · θ^(-2i/P)."""
    positions = torch.tensor([0, 1, 5])
    x = torch.randn(1, 1, 3, 6, dtype=torch.float64)
    turned = rotate(x, *rope_tables(positions, 6, 100.0, torch.float64))
    for row, position in enumerate(positions.tolist()):
        for pair in range(3):
            angle = position * 100.0 ** (-2 * pair / 6)
            a, b = x[0, 0, row, pair].item(), x[0, 0, row, pair + 3].item()
            expected = [a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)]
            assert turned[0, 0, row, [pair, pair + 3]].tolist() == pytest.approx(expected, abs=1e-14)


def test_rope_tables_are_made_in_float32_for_bfloat16_models() -> None:
    """Positions above 256 are not integers in bfloat16."""
    low, _ = rope_tables(torch.arange(1000), 4, 10_000.0, torch.bfloat16)
    exact, _ = rope_tables(torch.arange(1000), 4, 10_000.0, torch.float64)
    assert low.dtype == torch.bfloat16
    assert (low.double() - exact).abs().max() < 2**-8


def test_stacked_layout_is_the_same_mlp() -> None:
    torch.manual_seed(0)
    mlp = GatedMLP(6, 5).double()
    stacked, x = mlp.stacked_layout(), torch.randn(4, 6, dtype=torch.float64)
    gate, up = (x @ stacked["gate_up_proj"].t()).chunk(2, dim=-1)
    close(mlp(x), (F.silu(gate) * up) @ stacked["down_proj"].t())


def test_kv_cache_grows_per_layer() -> None:
    cache = KVCache(2)
    first, second = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 1, 4)
    assert torch.equal(cache.extend(1, first, -first)[0], first)
    keys, values = cache.extend(1, second, -second)
    assert torch.equal(keys, torch.cat([first, second], 2))
    assert torch.equal(values, -keys)
    assert torch.equal(cache.extend(0, second, second)[0], second), "layers are apart"


@pytest.mark.parametrize("precision", ["autocast", "bfloat16"])
def test_low_precision_runs_forward_and_backward(make_decoder: MakeDecoder, precision: str) -> None:
    """Eight bits over three layers whose logits are of order ten: the loss stays within 5 %."""
    model, ids = make_decoder("top2", dtype=torch.float32), some_ids(2, 8)
    exact = model.lm_loss_sum(ids, ids).item()
    if precision == "bfloat16":
        loss = model.bfloat16().lm_loss_sum(ids, ids)
    else:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.lm_loss_sum(ids, ids)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
