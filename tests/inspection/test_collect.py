"""The trace holds exactly what the routers did, token by token, over the whole held-out split."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from moectl.corpus.loader import PackedDataset
from moectl.errors import ConfigError
from moectl.inspection.collect import collect, token_groups
from moectl.models.decoder import Decoder
from moectl.moe.stats import expert_counts

Build = Callable[..., Decoder]


def test_trace_equals_the_layers_own_routing(dataset: PackedDataset, build: Build) -> None:
    model = build(router={"name": "top2"}).eval()
    trace = collect(model, dataset, batch_size=3, keep_hidden=True)

    batch = dataset.eval.batch(range(dataset.eval.num_blocks))
    with torch.no_grad():
        model(batch.input_ids, doc_ids=batch.doc_ids)
    assert trace.token_ids.tolist() == batch.input_ids.flatten().tolist()
    assert trace.num_tokens == dataset.eval.num_blocks * 16
    for number, layer in model.moe_layers().items():
        recorded, routing = trace.layers[number], layer.routing
        assert routing is not None and recorded.hidden is not None
        assert torch.equal(recorded.topk_indices, routing.topk_indices)
        for ours, theirs in (
            (recorded.topk_weights, routing.topk_weights),
            (recorded.probs, routing.router_probs_clean),
            (recorded.entropy, routing.entropy),
        ):
            # Another batch size: matrix products round differently.
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
        again = layer.router(recorded.hidden)
        assert torch.equal(again.topk_indices, recorded.topk_indices)


def test_domains_and_groups_of_tokens(dataset: PackedDataset, build: Build) -> None:
    trace = collect(build(), dataset)
    documents = torch.from_numpy(np.asarray(dataset.eval.doc_ids).astype(np.int64)).flatten().tolist()
    assert [dataset.documents[d].domain for d in documents] == [dataset.domains[i] for i in trace.token_domains]
    names = {}
    for document, group in zip(documents, trace.token_groups.tolist(), strict=True):
        key = (dataset.documents[document].domain, dataset.documents[document].group)
        assert names.setdefault(group, key) == key
    assert sorted(names) == list(range(len(trace.group_domains))), "groups are numbered without gaps"
    assert [names[g][0] for g in sorted(names)] == [dataset.domains[i] for i in trace.group_domains]


def test_group_counts_add_up(dataset: PackedDataset, build: Build) -> None:
    trace = collect(build(router={"name": "top2"}), dataset)
    for number, layer in trace.layers.items():
        grouped = trace.group_counts(number)
        assert grouped.counts.sum() == 2 * trace.num_tokens
        for index in range(len(dataset.domains)):
            chosen = layer.topk_indices[trace.token_domains == index]
            assert grouped.by_domain()[index].tolist() == expert_counts(chosen, 4).tolist()


def test_no_noise_no_gradient_and_the_mode_is_restored(dataset: PackedDataset, build: Build) -> None:
    model = build(router={"name": "top1", "noise_std": 50.0}).train()
    model.layers[1].eval()
    first, second = collect(model, dataset), collect(model, dataset)
    assert torch.equal(first.layers[0].topk_indices, second.layers[0].topk_indices)
    assert model.training and model.layers[0].training and not model.layers[1].training
    assert not first.layers[0].topk_weights.requires_grad
    assert not any(layer._forward_hooks for layer in model.moe_layers().values())


def test_hooks_go_even_when_the_observer_fails(dataset: PackedDataset, build: Build) -> None:
    model = build()

    def fail(*_: object) -> None:
        raise RuntimeError("observer")

    with pytest.raises(RuntimeError, match="observer"):
        collect(model, dataset, observer=fail)
    assert model.training
    assert not any(layer._forward_hooks for layer in model.moe_layers().values())


def test_observer_sees_the_routers_input_and_groups(dataset: PackedDataset, build: Build) -> None:
    seen: dict[int, list] = {0: [], 1: []}
    trace = collect(
        build(),
        dataset,
        keep_hidden=True,
        observer=lambda layer, x, groups, mask: seen[layer].append((x, groups, mask)),
    )
    for number, calls in seen.items():
        assert torch.equal(torch.cat([x for x, _, _ in calls]), trace.layers[number].hidden)
        assert torch.equal(torch.cat([groups for _, groups, _ in calls]), trace.token_groups)
        assert all(mask is None for _, _, mask in calls)


def test_hidden_states_are_not_kept_unasked(dataset: PackedDataset, build: Build) -> None:
    assert collect(build(), dataset).layers[0].hidden is None


def test_training_groups_are_not_held_out_groups(dataset: PackedDataset) -> None:
    groups = token_groups(dataset)
    for document in dataset.documents:
        assert (groups.ids[document.id] >= 0) == (document.split == "eval")


def test_a_dense_model_is_refused(dataset: PackedDataset, build: Build) -> None:
    with pytest.raises(ConfigError, match="no Mixture-of-Experts layers") as caught:
        collect(build(num_experts=0), dataset)
    assert caught.value.exit_code == 2
