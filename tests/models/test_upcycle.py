"""A trained dense decoder into a Mixture of Experts: the same function, and how exactly the same."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from moectl.config.schema import MoEConfig
from moectl.errors import ConfigError
from moectl.models.config import DecoderConfig
from moectl.models.decoder import Decoder, GatedMLP
from moectl.models.language_model import LanguageModel
from moectl.models.upcycle import upcycle_decoder
from moectl.moe import GatedExperts
from tests.models.conftest import VOCABULARY, MakeDecoder

TOP2 = {"name": "top2"}
TOP3_OF_4 = {"name": "topk", "top_k": 3}
KEEPS = [{"name": "top1"}, TOP2, TOP3_OF_4, {"name": "topk", "top_k": 4, "norm_topk_prob": False}]


def moe(router: dict[str, object] | None = None, **changes: object) -> MoEConfig:
    values: dict[str, object] = {
        "router": router or {"name": "top1"}, "num_experts": 4, "layers": "last:2", "init": "copy", "init_noise": 0.0,
    }  # fmt: skip
    return MoEConfig.model_validate({**values, **changes})


def ids(rows: int = 3, length: int = 17) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def difference(dense: Decoder, upcycled: Decoder) -> float:
    with torch.no_grad():
        return float((dense(ids()) - upcycled(ids())).abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layers", ["last:2", "all", "1"])
@pytest.mark.parametrize("width", [(16, 20), (24, 33)], ids=str)
def test_full_backend_with_top1_is_exact(
    make_decoder: MakeDecoder, dtype: torch.dtype, training: bool, layers: str, width: tuple[int, int]
) -> None:
    """Not one bit, in training too: the straight-through weight is 1 and noise only chooses among equals."""
    dense = make_decoder(dtype=dtype, hidden_size=width[0], intermediate_size=width[1])
    upcycled = upcycle_decoder(dense, moe(layers=layers, backend="full")).train(training)
    assert difference(dense, upcycled) == 0.0


@pytest.mark.parametrize("router", KEEPS, ids=str)
@pytest.mark.parametrize("backend", ["grouped", "loop", "full"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_function_is_kept(
    make_decoder: MakeDecoder, router: dict[str, object], backend: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Products over another number of rows round differently."""
    dense = make_decoder(dtype=dtype)
    assert difference(dense, upcycle_decoder(dense, moe(router, backend=backend)).eval()) <= tolerance


def test_float64_weights_keep_all_their_bits(make_decoder: MakeDecoder) -> None:
    """A float64 base whose weights float32 cannot hold, as any trained one's are."""
    dense = make_decoder()
    assert any(not torch.equal(p, p.float().double()) for p in dense.parameters())
    upcycled = upcycle_decoder(dense, moe())
    mine = dict(upcycled.named_parameters())
    for name, parameter in dense.named_parameters():
        if name in mine:
            assert torch.equal(mine[name], parameter), name
    for number, layer in upcycled.moe_layers().items():
        source = dense.layers[number].mlp
        assert isinstance(source, GatedMLP)
        for name, tensor in source.stacked_layout().items():
            for expert in getattr(layer.experts, name):
                assert torch.equal(expert, tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_and_tied_embeddings_follow_the_base(make_decoder: MakeDecoder, dtype: torch.dtype) -> None:
    for tied in (True, False):
        upcycled = upcycle_decoder(make_decoder(dtype=dtype, tie_word_embeddings=tied), moe())
        assert {p.dtype for p in upcycled.parameters()} == {dtype}
        assert (upcycled.lm_head.weight is upcycled.embed_tokens.weight) == tied


def test_only_the_named_layers_change_and_the_base_never(make_decoder: MakeDecoder) -> None:
    dense = make_decoder()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    upcycled = upcycle_decoder(dense, moe(layers="1"))
    assert list(upcycled.moe_layers()) == [1]
    assert isinstance(upcycled.layers[0].mlp, GatedMLP)
    with torch.no_grad():
        for parameter in upcycled.parameters():
            parameter.zero_()
    for name, tensor in dense.state_dict().items():
        assert torch.equal(tensor, before[name]), "the copy shares memory with the base"


def test_weights_that_do_not_sum_to_one_are_refused_for_copies(make_decoder: MakeDecoder) -> None:
    for router in ({"name": "switch"}, {"name": "topk", "top_k": 2, "norm_topk_prob": False}):
        with pytest.raises(ConfigError, match="do not sum to one") as error:
            upcycle_decoder(make_decoder(), moe(router))
        assert error.value.exit_code == 2
        assert upcycle_decoder(make_decoder(), moe(router, init="random")).moe_layers()


def test_the_refusal_is_about_something(make_decoder: MakeDecoder) -> None:
    """Copies under raw weights do shrink their layers' output."""
    dense = make_decoder()
    upcycled = upcycle_decoder(dense, moe(TOP2)).eval()
    for layer in upcycled.moe_layers().values():
        layer.router.config = layer.router.config.model_copy(update={"norm_topk_prob": False})
    assert difference(dense, upcycled) > 0.1


def test_noise_moves_the_experts_apart_but_the_function_little(make_decoder: MakeDecoder) -> None:
    dense = make_decoder()

    def noisy(seed: int, noise: float = 1e-3) -> Decoder:
        return upcycle_decoder(dense, moe(init_noise=noise), torch.Generator().manual_seed(seed)).eval()

    upcycled = noisy(0)
    for number, layer in upcycled.moe_layers().items():
        source = dense.layers[number].mlp
        assert isinstance(source, GatedMLP)
        for name, tensor in source.stacked_layout().items():
            added = getattr(layer.experts, name) - tensor
            assert added.std().item() == pytest.approx(1e-3 * tensor.std().item(), rel=0.1)
            assert not torch.equal(added[0], added[1])
    assert 0 < difference(dense, upcycled) < 0.5
    assert difference(upcycled, noisy(1)) > 0
    same, again = noisy(0).state_dict(), noisy(0).state_dict()
    assert all(torch.equal(same[name], again[name]) for name in same if "experts" in name)


def test_gates_come_from_the_global_generator_and_differ_by_layer(make_decoder: MakeDecoder) -> None:
    dense = make_decoder()

    def gates(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [layer.router.weight for layer in upcycle_decoder(dense, moe()).moe_layers().values()]

    assert all(torch.equal(one, other) for one, other in zip(gates(0), gates(0), strict=True))
    first, second = gates(0)
    assert not torch.equal(first, second)
    assert not torch.equal(first, gates(1)[0])


def test_shared_experts_start_silent_and_can_learn(make_decoder: MakeDecoder) -> None:
    dense = make_decoder()
    upcycled = upcycle_decoder(dense, moe(n_shared_experts=2, backend="full"))
    assert difference(dense, upcycled) == 0.0
    shared = upcycled.moe_layers()[1].shared_experts
    assert isinstance(shared, GatedMLP)
    assert shared.up_proj.out_features == 2 * dense.config.intermediate_size
    upcycled.lm_loss_sum(ids(), ids()).backward()
    assert shared.down_proj.weight.grad is not None
    assert shared.down_proj.weight.grad.any()


def test_random_experts_are_fresh_and_may_have_another_size(make_decoder: MakeDecoder) -> None:
    dense = make_decoder()
    upcycled = upcycle_decoder(dense, moe(init="random", expert_intermediate_size=7))
    experts = upcycled.moe_layers()[1].experts
    assert isinstance(experts, GatedExperts)
    assert experts.down_proj.shape == (4, 16, 7)
    assert not torch.equal(experts.down_proj[0], experts.down_proj[1])
    assert difference(dense, upcycled.eval()) > 1e-3


def test_copies_of_another_size_are_refused(make_decoder: MakeDecoder) -> None:
    with pytest.raises(ConfigError, match="20 neurons, not 7"):
        upcycle_decoder(make_decoder(), moe(expert_intermediate_size=7))


def test_experts_are_not_upcycled_again(make_decoder: MakeDecoder) -> None:
    with pytest.raises(ConfigError, match="has experts already"):
        upcycle_decoder(make_decoder("top1"), moe())


def test_an_undecided_init_is_a_mistake_of_the_caller(make_decoder: MakeDecoder) -> None:
    with pytest.raises(AssertionError):
        upcycle_decoder(make_decoder(), moe(init="auto"))


def test_the_upcycled_gate_learns_from_the_language_model(make_decoder: MakeDecoder) -> None:
    """Straight-through: with experts that differ, the language-model loss alone moves the gate."""
    upcycled = upcycle_decoder(make_decoder(), moe(init_noise=0.1), torch.Generator().manual_seed(0)).train()
    upcycled.lm_loss_sum(ids()[:, :-1], ids()[:, 1:]).backward()
    for layer in upcycled.moe_layers().values():
        assert layer.router.weight.grad is not None
        assert layer.router.weight.grad.any(1).all()


# --- the other inits: what is the same for every family is tested with its tensors and with transformers' models


@pytest.mark.parametrize(("granularity", "shared"), [(4, 0), (4, 1), (2, 1), (20, 0)])
def test_parts_keep_the_function_and_the_cost(make_decoder: MakeDecoder, granularity: int, shared: int) -> None:
    dense = make_decoder()
    router = {"name": "topk", "top_k": granularity - shared}
    options = {"granularity": granularity, "n_shared_experts": shared, "num_experts": 2 * (granularity - shared)}
    config = moe(router, init="split", **options)
    upcycled = upcycle_decoder(dense, config).eval()
    assert difference(dense, upcycled) <= 1e-10
    assert upcycled.config.expert_intermediate_size == 20 // granularity
    again = Decoder(DecoderConfig.from_dict(upcycled.config.to_dict()))
    again.double().load_state_dict(upcycled.state_dict())
    assert difference(upcycled, again.eval()) == 0.0


def test_dropped_neurons_change_the_function_and_none_keeps_it(make_decoder: MakeDecoder) -> None:
    dense = make_decoder()
    assert difference(dense, upcycle_decoder(dense, moe(init="drop", drop_ratio=0.0)).eval()) <= 1e-10
    assert difference(dense, upcycle_decoder(dense, moe(init="drop")).eval()) > 1e-3


def test_experts_from_other_decoders(make_decoder: MakeDecoder) -> None:
    dense, donors = make_decoder(), [make_decoder(seed=seed) for seed in (1, 2)]
    config = moe(init="experts-from", num_experts=2, experts_from=["one", "two"])
    layers = upcycle_decoder(dense, config, experts=donors).moe_layers()
    for number, layer in layers.items():
        for expert, donor in enumerate(donors):
            source = donor.layers[number].mlp
            assert isinstance(source, GatedMLP)
            assert torch.equal(layer.experts.down_proj[expert], source.down_proj.weight)
    with pytest.raises(ConfigError, match="1 models were given for 2"):
        upcycle_decoder(dense, config, experts=donors[:1])
    with pytest.raises(ConfigError, match="'two' is no fine-tune of the base"):
        upcycle_decoder(dense, config, experts=[donors[0], make_decoder(intermediate_size=24)])
    with pytest.raises(ConfigError, match="router_prompts needs a Hugging Face base"):
        upcycle_decoder(dense, config.model_copy(update={"router_prompts": ("x", "y")}), experts=donors)


def test_shrinking_on_purpose(make_decoder: MakeDecoder) -> None:
    dense = make_decoder()
    shrunk = upcycle_decoder(dense, moe({"name": "switch"}, allow_shrinking=True)).eval()
    assert difference(dense, shrunk) > 1e-2


def test_our_decoder_is_a_language_model(make_decoder: MakeDecoder) -> None:
    for kind in ("dense", "top1"):
        decoder = make_decoder(kind)
        assert isinstance(decoder, LanguageModel)
        assert (decoder.kind, decoder.vocab_size, decoder.eos_token_id) == ("decoder", VOCABULARY, 0)
        assert decoder.max_length is None
        described = json.loads(json.dumps(decoder.describe()))
        assert DecoderConfig.from_dict(described["decoder"]) == decoder.config
    assert not isinstance(torch.nn.Linear(2, 2), LanguageModel)
