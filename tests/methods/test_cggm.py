# SPDX-License-Identifier: Apache-2.0
import copy

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from torch import nn

from monai_cggm.handlers import ClipGradients
from monai_cggm.methods import CGGM, UnimodalObserver
from monai_cggm.methods.direction import direction_loss, head_gradient
from monai_cggm.metrics import NegativeMAE
from tests.methods import toy
from tests.methods.toy import everything, gradients_of_one_step, metric, parts


def reference(network, classifiers, batch, *, rho, lam):
    """The paper's step with nothing but autograd and NumPy: no hooks, no closed form."""
    image, label = batch["image"], batch["label"]
    features = {m: e(image[:, i : i + 1]) for i, (m, e) in enumerate(network.encoders.items())}
    task = toy.cross_entropy(network.head(network.trunk(torch.cat(list(features.values()), dim=1))), label)
    predictions = classifiers({m: h.detach() for m, h in features.items()}, label.shape[2:])
    losses = [toy.cross_entropy(p, label) for p in predictions.values()]

    def dice(prediction):
        classes, truth = prediction.argmax(1).numpy(), label[:, 0].numpy()
        scores = []
        for region in toy.REGIONS.values():
            p, t = np.isin(classes, region), np.isin(truth, region)
            scores.append(2 * (p & t).sum() / (p.sum() + t.sum()))
        return np.mean(scores)

    epsilon = np.array([dice(p) for p in predictions.values()])
    terms = torch.tensor(rho * (epsilon.sum() - epsilon) / epsilon.sum())  # ε before the first step is 0
    (g_fusion,) = torch.autograd.grad(task, network.head.weight, create_graph=True)
    g = [
        torch.autograd.grad(loss, classifiers.heads[m].weight, retain_graph=True)[0]
        for m, loss in zip(features, losses, strict=True)
    ]
    cosine = torch.stack([nn.functional.cosine_similarity(g_fusion.flatten(), x.flatten(), dim=0) for x in g])
    l_gm = (terms.abs() - terms * cosine).mean()
    names = [n for n, _ in network.named_parameters()]
    expected = dict(zip(names, torch.autograd.grad(task + lam * l_gm, list(network.parameters())), strict=True))
    for i, m in enumerate(features):
        for name in expected:
            if name.startswith(f"encoders.{m}."):
                expected[name] = expected[name] * terms[i]
    return expected, dict(zip(features, terms.tolist(), strict=True)), l_gm.item(), cosine.tolist()


@pytest.mark.parametrize("modalities", [("pet", "ct"), ("flair", "t1", "t2"), toy.MODALITIES])
def test_one_step_equals_the_paper_by_autograd(modalities):
    network, classifiers = parts(modalities, dtype=torch.float64)
    (batch,) = toy.batches(1, modalities=len(modalities), size=9, dtype=torch.float64)
    expected, terms, l_gm, cosine = reference(network, classifiers, batch, rho=1.2, lam=0.1)
    seen = gradients_of_one_step(network, classifiers, [batch], CGGM(network, classifiers, metric(), rho=1.2, lam=0.1))
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    scalars = seen["scalars"]
    assert scalars["loss/gm"] == pytest.approx(l_gm)
    for i, m in enumerate(modalities):
        assert scalars[f"balance/{m}"] == pytest.approx(terms[m])
        assert scalars[f"cosine/{m}"] == pytest.approx(cosine[i])
        after = torch.cat([seen[n].flatten() for n in seen if n.startswith(f"encoders.{m}.")]).norm().item()
        assert scalars[f"modulated_norm/{m}"] == pytest.approx(after)
        assert scalars[f"gradient_norm/{m}"] * abs(terms[m]) == pytest.approx(after)


def test_the_direction_loss_s_gradient_against_finite_differences():
    network, _ = parts(dtype=torch.float64)
    (batch,) = toy.batches(1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(4, network.head.weight.numel(), generator=generator, dtype=torch.float64)  # g_i and B frozen
    terms = torch.tensor([0.4, -0.3, 1.5, 0.9], dtype=torch.float64)

    def l_gm(create_graph):
        z = network.trunk(
            torch.cat([e(batch["image"][:, i : i + 1]) for i, e in enumerate(network.encoders.values())], 1)
        )
        output = network.head(z)
        (delta,) = torch.autograd.grad(toy.cross_entropy(output, batch["label"]), output, create_graph=create_graph)
        return direction_loss(head_gradient(delta, z), g, terms)

    analytic = torch.autograd.grad(l_gm(True), everything(network), allow_unused=True)
    step = 1e-6
    for (name, parameter), gradient in zip(network.named_parameters(), analytic, strict=True):
        for index in range(0, parameter.numel(), max(1, parameter.numel() // 4)):
            flat = parameter.data.view(-1)
            before = flat[index].item()
            flat[index] = before + step
            up = l_gm(False).item()
            flat[index] = before - step
            down = l_gm(False).item()
            flat[index] = before
            assert gradient.flatten()[index].item() == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-8), name


def network_gradients(direction, lam, *, steps=3):
    network, classifiers = parts()
    method = CGGM(network, classifiers, metric(), lam=lam, direction=direction)
    engine = toy.trainer(network, everything(network, classifiers), toy.batches(steps), method)
    engine.run()
    return {n: p.detach().clone() for n, p in network.named_parameters()}


def test_gradient_mode_changes_the_update_and_lagged_does_not():
    off = network_gradients("off", 0.5)
    lagged = network_gradients("lagged", 0.5)
    gradient = network_gradients("gradient", 0.5)
    for name, weight in off.items():
        assert torch.equal(lagged[name], weight), name
    changed = [n for n, w in off.items() if not torch.equal(gradient[n], w)]
    assert len(changed) == len(off)
    assert max((gradient[n] - w).abs().max().item() for n, w in off.items()) > 1e-3


def test_lagged_adds_last_step_s_value_to_the_loss():
    network, classifiers = parts()
    method = CGGM(network, classifiers, metric(), lam=0.5, direction="lagged")
    engine = toy.trainer(network, everything(network, classifiers), toy.batches(2), method, lr=0.0)
    losses = []
    engine.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: losses.append((e.state.output["loss"].item(), e.state.scalars))
    )
    engine.run()
    plain = [s["loss/task"] + sum(s[f"loss/{m}"] for m in toy.MODALITIES) for _, s in losses]
    assert losses[0][0] == pytest.approx(plain[0])
    assert losses[1][1]["loss/gm"] > 0
    assert losses[1][0] == pytest.approx(plain[1] + 0.5 * losses[1][1]["loss/gm"])


def test_weights_mode_pulls_the_head_only_and_towards_last_step_s_weights():
    data = toy.batches(2)
    network, classifiers = parts()
    method = CGGM(network, classifiers, metric(), rho=1.0, lam=0.3, direction="weights", magnitude=False)
    head, heads = (
        network.head.weight.detach().clone(),
        {m: h.weight.detach().clone() for m, h in classifiers.heads.items()},
    )
    off_network, off_classifiers = copy.deepcopy(network), copy.deepcopy(classifiers)
    off = CGGM(off_network, off_classifiers, metric(), rho=1.0, direction="off", magnitude=False)
    terms, gradients = [], []
    for net, cls, m in ((network, classifiers, method), (off_network, off_classifiers, off)):
        engine = toy.trainer(net, everything(net, cls), data, m, lr=0.0)
        kept = []
        engine.add_event_handler(
            IterationEvents.MODEL_COMPLETED,
            lambda e, net=net, kept=kept: kept.append({n: p.grad.clone() for n, p in net.named_parameters()}),
        )
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: terms.append(e.state.scalars))
        engine.run()
        gradients.append(kept[1])
    first_terms = torch.tensor([terms[0][f"balance/{m}"] for m in toy.MODALITIES])
    weight = head.clone().requires_grad_()
    loss = direction_loss(weight.flatten(), torch.stack([h.flatten() for h in heads.values()]), first_terms)
    (pull,) = torch.autograd.grad(0.3 * loss, weight)
    for name, gradient in gradients[0].items():
        expected = gradients[1][name] + (pull if name == "head.weight" else 0)
        torch.testing.assert_close(gradient, expected, msg=name)
    assert pull.abs().max() > 1e-3


def test_magnitude_touches_the_declared_encoders_and_nothing_else():
    (batch,) = toy.batches(1)
    network, classifiers = parts()
    plain = gradients_of_one_step(network, classifiers, [batch], UnimodalObserver(network, classifiers, metric()))
    scaled = gradients_of_one_step(network, classifiers, [batch], CGGM(network, classifiers, metric(), direction="off"))
    terms = {m: scaled["scalars"][f"balance/{m}"] for m in toy.MODALITIES}
    assert len({round(t, 6) for t in terms.values()}) > 1
    for name in set(plain) - {"scalars", "loss"}:
        owner = next((m for m in toy.MODALITIES if name.startswith(f"encoders.{m}.")), None)
        torch.testing.assert_close(scaled[name], plain[name] * (terms[owner] if owner else 1.0), msg=name)


def test_encoders_get_exactly_nothing_from_classifiers_and_classifiers_nothing_from_the_direction_loss():
    (batch,) = toy.batches(1)
    network, classifiers = parts()
    joint = copy.deepcopy(network)
    loss = toy.cross_entropy(joint(batch["image"]), batch["label"])
    loss.backward()
    observed = gradients_of_one_step(network, classifiers, [batch], UnimodalObserver(network, classifiers, metric()))
    for name, parameter in joint.named_parameters():
        assert torch.equal(observed[name], parameter.grad), name
    cggm = gradients_of_one_step(network, classifiers, [batch], CGGM(network, classifiers, metric(), lam=5.0))
    for name in (n for n in observed if n.startswith("classifiers.")):
        assert torch.equal(cggm[name], observed[name]), name


class DropoutNetwork(toy.ToyNetwork):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.3, self.training))


def test_observe_equals_joint_bit_for_bit_even_with_dropout_in_the_classifiers():
    data = toy.batches(5)

    def trained(observe):
        torch.manual_seed(3)
        network = DropoutNetwork()
        classifiers = toy.ToyClassifiers(dropout=0.5)
        method = UnimodalObserver(network, classifiers, metric()) if observe else None
        modules = [network, classifiers] if observe else [network]
        torch.manual_seed(4)
        toy.trainer(
            network, everything(*modules), data, method, handlers=[ClipGradients(modules, 0.05)], epochs=2
        ).run()
        return network.state_dict()

    joint, observed = trained(False), trained(True)
    for name, weight in joint.items():
        assert torch.equal(weight, observed[name]), name


def test_the_leader_of_a_regression_gets_the_smallest_term():
    """ε = −MAE must rise as a classifier learns. Equation 7 does not see a wrong sign, the rule "positive" does."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 3, 4, generator=generator)
    target = x[:, 1].sum(dim=1) + 0.3 * x[:, 0].sum(dim=1)  # text tells most, video nothing
    torch.manual_seed(0)
    names = ("audio", "text", "video")
    network, classifiers = toy.RegressionNetwork(names), toy.RegressionClassifiers(names)
    method = CGGM(network, classifiers, NegativeMAE(), rho=1.3, direction="off", rule="positive")
    method.epsilon = torch.full((3,), -target.abs().mean().item(), dtype=torch.float64)  # of predicting zero
    data = [{"image": x, "label": target}] * 20
    engine = toy.trainer(network, everything(network, classifiers), data, method, lr=0.05, loss=toy.l1)
    rows = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: rows.append(e.state.scalars))
    engine.run()
    epsilon = np.array([[r[f"epsilon/{m}"] for m in names] for r in rows])
    terms = np.median([[r[f"balance/{m}"] for m in names] for r in rows][5:], axis=0)
    assert np.argmax(epsilon[-1] - epsilon[5]) == 1
    assert np.argmin(terms) == 1
    assert terms[1] < 0.5 < 1.0 < min(terms[0], terms[2])


def test_a_batch_without_any_region_keeps_epsilon_and_gives_the_mean_factor():
    network, classifiers = parts()
    method = CGGM(network, classifiers, metric())
    data = toy.batches(2)
    data[1]["label"] = torch.zeros_like(data[1]["label"])
    engine = toy.trainer(network, everything(network, classifiers), data, method)
    rows = []
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: rows.append(e.state.scalars))
    engine.run()
    for m in toy.MODALITIES:
        assert rows[1][f"epsilon/{m}"] == rows[0][f"epsilon/{m}"]
        assert rows[1][f"balance/{m}"] == pytest.approx(0.9)
    assert rows[1]["balance_undefined"] == 1
    assert all(torch.isfinite(p).all() for p in network.parameters())


def test_the_log_counts_how_often_equation_7_had_no_value(caplog):
    network, classifiers = parts()
    data = toy.batches(3)
    data[2]["label"] = torch.zeros_like(data[2]["label"])
    engine = toy.trainer(network, everything(network, classifiers), data, CGGM(network, classifiers, metric()))
    with caplog.at_level("INFO"):
        engine.run()
    assert "no finite value in 1 of 3 iterations; every encoder got the mean factor 0.900" in caplog.text
    assert "attached: CGGM(modalities=['flair', 't1ce', 't1', 't2'], rho=1.2, lam=0.1" in caplog.text


def test_hooks_are_gone_after_the_run_and_after_a_failure():
    network, classifiers = parts()
    method = CGGM(network, classifiers, metric())
    engine = toy.trainer(network, everything(network, classifiers), toy.batches(2), method)
    engine.run()
    assert not any(m._forward_hooks for m in [*network.modules(), *classifiers.modules()])

    failing = toy.trainer(
        network, everything(network, classifiers), toy.batches(2), CGGM(network, classifiers, metric())
    )

    @failing.on(Events.ITERATION_COMPLETED)
    def fail(engine):
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        failing.run()
    assert not any(m._forward_hooks for m in [*network.modules(), *classifiers.modules()])


def test_a_forward_pass_between_steps_leaves_no_trace():
    def trained(validate):
        network, classifiers = parts()
        method = CGGM(network, classifiers, metric(), lam=0.5)
        engine = toy.trainer(network, everything(network, classifiers), toy.batches(4), method)
        if validate:
            probe = toy.batches(1, seed=9)[0]["image"]
            engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: network(probe))
        engine.run()
        return network.state_dict()

    plain, validated = trained(False), trained(True)
    assert all(torch.equal(plain[n], validated[n]) for n in plain)


@pytest.mark.parametrize("direction", ["gradient", "weights", "lagged", "off"])
def test_a_resumed_run_goes_on_exactly(direction, tmp_path):
    data = toy.batches(6)

    def method_of(network, classifiers):
        return CGGM(network, classifiers, metric(), lam=0.4, direction=direction)

    def run(network, classifiers, batches, method):
        toy.trainer(network, everything(network, classifiers), batches, method).run()

    network, classifiers = parts(dropout=0.4)
    method = method_of(network, classifiers)
    run(network, classifiers, data, method)

    first, first_classifiers = parts(dropout=0.4)
    first_method = method_of(first, first_classifiers)
    run(first, first_classifiers, data[:3], first_method)
    torch.save(
        {"n": first.state_dict(), "c": first_classifiers.state_dict(), "m": first_method.state_dict()},
        tmp_path / "s.pt",
    )
    state = torch.load(tmp_path / "s.pt", weights_only=True)
    second, second_classifiers = parts(dropout=0.4, seed=7)
    second.load_state_dict(state["n"])
    second_classifiers.load_state_dict(state["c"])
    second_method = method_of(second, second_classifiers)
    second_method.load_state_dict(state["m"])
    run(second, second_classifiers, data[3:], second_method)
    for name, weight in [*network.state_dict().items(), *classifiers.state_dict().items()]:
        other = second.state_dict().get(name, second_classifiers.state_dict().get(name))
        assert torch.equal(weight, other), name
    assert torch.equal(second_method.epsilon, method.epsilon)
    assert torch.equal(second_method.state_dict()["counts"], method.state_dict()["counts"])


def test_a_checkpoint_of_other_modalities_is_refused():
    network, classifiers = parts()
    state = CGGM(network, classifiers, metric()).state_dict()
    other = CGGM(*parts(("t1", "t2")), metric())
    with pytest.raises(ValueError, match=r"checkpoint is of modalities .*flair.* this run has \['t1', 't2'\]"):
        other.load_state_dict(state)


def shared_encoder(network, classifiers):
    encoder = network.encoders["flair"]
    return {"encoders": {**network.encoders, "t2": encoder}}


def frozen_encoder(network, classifiers):
    network.encoders["t1"].requires_grad_(False)
    return {}


def empty_encoder(network, classifiers):
    return {"encoders": {**network.encoders, "t2": nn.Identity()}}


def foreign_encoder(network, classifiers):
    return {"encoders": {**network.encoders, "t2": nn.Conv2d(1, 1, 1)}}


def wide_head(network, classifiers):
    classifiers.heads["t2"] = nn.Conv2d(9, 4, 1)
    return {}


def missing_classifier(network, classifiers):
    del classifiers.heads["t2"]
    return {}


def big_kernel(network, classifiers):
    return {"head": network.encoders["t2"][0]}


def classifier_of_the_network(network, classifiers):
    classifiers.heads["t1"] = network.head
    return {}


def strided_head(network, classifiers):
    return {"head": nn.Conv2d(5, 4, 1, stride=2)}


def no_encoders(network, classifiers):
    return {"encoders": {}}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shared_encoder, "'t2' and 'flair' share a parameter"),
        (frozen_encoder, "'t1' has no parameter that takes a gradient"),
        (empty_encoder, "'t2' has no parameter that takes a gradient"),
        (foreign_encoder, "'t2' has a parameter that is not the network's"),
        (wide_head, r"head of 't2' has weight \(4, 9, 1, 1\), the network's head \(4, 5, 1, 1\)"),
        (missing_classifier, "classifiers for .*'flair', 't1', 't1ce'"),
        (big_kernel, "linear layer or a 1×1 convolution, found Conv2d"),
        (classifier_of_the_network, "network and classifiers share a parameter"),
        (strided_head, "linear layer or a 1×1 convolution, found Conv2d"),
        (no_encoders, "`encoders=` must name one module a modality"),
    ],
)
def test_wrong_parts_are_refused_at_construction(spoil, message):
    network, classifiers = parts()
    with pytest.raises(ValueError, match=message):
        CGGM(network, classifiers, metric(), **spoil(network, classifiers))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": 0.0}, "rho must be positive, got 0.0"),
        ({"lam": -0.1}, "lam must not be negative, got -0.1"),
        ({"rule": "soft"}, "got 'soft'"),
        ({"direction": "up"}, "got 'up'"),
        ({"max_share": 0.0}, "max_share must be positive or None, got 0.0"),
        ({"control": "reversed"}, "none, constant, shuffled, got 'reversed'"),
        ({"scale": "update"}, "equation 7 has no bound: give a bounded rule"),
    ],
)
def test_wrong_numbers_are_refused_at_construction(arguments, message):
    network, classifiers = parts()
    with pytest.raises(ValueError, match=message):
        CGGM(network, classifiers, metric(), **arguments)


def test_one_modality_is_refused():
    with pytest.raises(ValueError, match="two modalities or more"):
        CGGM(*parts(("flair",)), metric())


def test_accumulation_is_refused():
    network, classifiers = parts()
    engine = toy.trainer(
        network,
        everything(network, classifiers),
        toy.batches(2),
        CGGM(network, classifiers, metric()),
        accumulation_steps=2,
    )
    with pytest.raises(ValueError, match=r"accumulation_steps=2.*compound"):
        engine.run()


def test_an_optimizer_without_the_classifiers_is_refused():
    network, classifiers = parts()
    engine = toy.trainer(network, everything(network), toy.batches(1), CGGM(network, classifiers, metric()))
    with pytest.raises(ValueError, match="no parameter of 'classifiers'"):
        engine.run()


def test_a_wholly_compiled_network_is_refused():
    network, classifiers = parts()
    with pytest.raises(ValueError, match="whole network is compiled"):
        CGGM(torch.compile(network), classifiers, metric(), encoders=network.encoders, head=network.head)
    network.compile()
    with pytest.raises(ValueError, match="whole network is compiled"):
        CGGM(network, classifiers, metric())


def test_a_user_s_network_with_other_names():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(1, 3, 3, padding=1)
            self.out = nn.Conv2d(6, 4, 1)

        def forward(self, x):
            return self.out(torch.cat([self.left(x[:, :1]), self.right(x[:, 1:])], dim=1))

    class Probes(nn.Module):
        def __init__(self):
            super().__init__()
            self.lift = nn.ModuleDict({"l": nn.Conv2d(3, 6, 1), "r": nn.Conv2d(3, 6, 1)})
            self.last = nn.ModuleDict({"l": nn.Conv2d(6, 4, 1), "r": nn.Conv2d(6, 4, 1)})

        def forward(self, features, size):
            return {m: self.last[m](self.lift[m](h)) for m, h in features.items()}

    network, probes = Mine(), Probes()
    method = CGGM(
        network,
        probes,
        metric(),
        encoders={"l": network.left, "r": network.right},
        head=network.out,
        classifier_heads=probes.last,
    )
    before = copy.deepcopy(network.state_dict())
    engine = toy.trainer(network, everything(network, probes), toy.batches(2, modalities=2), method)
    engine.run()
    assert all(not torch.equal(before[n], w) for n, w in network.state_dict().items())
    assert set(engine.state.scalars) >= {"balance/l", "balance/r", "cosine/r"}


def test_classifiers_that_go_on_after_their_heads_are_refused_in_the_first_step():
    class Scaled(toy.ToyClassifiers):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, features, size):
            return {m: self.scale * logits for m, logits in super().forward(features, size).items()}

    network, classifiers = toy.ToyNetwork(), Scaled()
    engine = toy.trainer(
        network, everything(network, classifiers), toy.batches(1), CGGM(network, classifiers, metric())
    )
    with pytest.raises(ValueError, match=r"reach scale by a way that does not go through the heads"):
        engine.run()


def test_a_classifier_s_loss_is_differentiated_once_a_step():
    passes = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits.view_as(logits)

        @staticmethod
        def backward(ctx, gradient):
            passes.append(1)
            return gradient

    network, classifiers = toy.parts()
    method = CGGM(
        network, classifiers, metric(), loss_function=lambda logits, y: toy.cross_entropy(Counted.apply(logits), y)
    )
    engine = toy.trainer(network, everything(network, classifiers), toy.batches(3), method)
    engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), lambda _engine: passes.clear())
    engine.run()
    assert len(passes) == 2 * len(toy.MODALITIES)


def norms_at_the_head_s_input(network, classifiers, batch, terms):
    """‖∂L_task/∂z‖ and ‖∂L_gm/∂z‖ with nothing but autograd."""
    label = batch["label"]
    features = toy.features_of(network, batch["image"])
    z = network.trunk(torch.cat(list(features.values()), dim=1)).detach().requires_grad_()
    task = toy.cross_entropy(network.head(z), label)
    (g_fusion,) = torch.autograd.grad(task, network.head.weight, create_graph=True)
    loss = 0.0
    for (m, prediction), term in zip(classifiers(features, label.shape[2:]).items(), terms, strict=True):
        (g,) = torch.autograd.grad(toy.cross_entropy(prediction, label), classifiers.heads[m].weight, retain_graph=True)
        cosine = nn.functional.cosine_similarity(g_fusion.flatten(), g.flatten(), dim=0)
        loss = loss + (abs(term) - term * cosine) / len(terms)
    return [torch.autograd.grad(x, z, retain_graph=True)[0].norm().item() for x in (task, loss)]


@pytest.mark.parametrize("modalities", [("pet", "ct"), toy.MODALITIES], ids=len)
@pytest.mark.parametrize(("lam", "share"), [(50.0, 0.2), (5.0, 1.5), (1e-4, 0.2)])
def test_the_direction_term_gets_its_share_of_the_gradient_at_most(lam, share, modalities):
    network, classifiers = parts(modalities, dtype=torch.float64)
    (batch,) = toy.batches(1, modalities=len(modalities), size=7, dtype=torch.float64)
    terms = reference(network, classifiers, batch, rho=1.2, lam=lam)[1]
    task, direction = norms_at_the_head_s_input(network, classifiers, batch, list(terms.values()))
    bound = share * task / direction
    assert (bound < lam) == (lam > 1)
    expected = reference(network, classifiers, batch, rho=1.2, lam=min(lam, bound))[0]
    method = CGGM(network, classifiers, metric(), rho=1.2, lam=lam, max_share=share)
    seen = gradients_of_one_step(network, classifiers, [batch], method)
    assert seen["scalars"]["lam"] == pytest.approx(min(lam, bound), rel=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-5, atol=1e-9, msg=name)


@pytest.mark.parametrize("direction", ["weights", "lagged", "off"])
def test_a_bound_changes_nothing_where_the_direction_term_does_not_reach_the_head_s_input(direction):
    def trained(max_share):
        network, classifiers = parts()
        method = CGGM(network, classifiers, metric(), lam=0.5, direction=direction, max_share=max_share)
        toy.trainer(network, everything(network, classifiers), toy.batches(3), method).run()
        return network.state_dict()

    free, bounded = trained(None), trained(1e-6)
    assert all(torch.equal(free[name], weight) for name, weight in bounded.items())
