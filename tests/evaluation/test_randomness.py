"""All evaluations of a step draw the same random numbers, other ones than the next step; nobody else notices."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optimizer_steps import assert_same, weights
from zolightning.callbacks import ZerothOrder
from zolightning.evaluation.randomness import Generators
from zolightning.optim import MeZO, ZerothOrderOptimizer
from zolightning.optim.share import Share

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))


class AutoEncoder(nn.Module):
    """A variational autoencoder: its latents are drawn by `noise`."""

    def __init__(self, noise: Callable[[Tensor], Tensor] = torch.randn_like) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.encoder, self.decoder = nn.Linear(4, 6), nn.Linear(3, 4)
        self.noise = noise

    def loss(self) -> Tensor:
        mean, log_variance = self.encoder(X).chunk(2, dim=1)
        latent = mean + (log_variance / 2).exp() * self.noise(mean)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        return F.mse_loss(self.decoder(latent), X) + 0.1 * divergence


def attached(net: Any, **kwargs: Any) -> ZerothOrderOptimizer:
    optimizer = MeZO(net.named_parameters(), **{"lr": 0.02, "seed": 3, "num_queries": 2} | kwargs)
    optimizer.attach(net)
    return optimizer


def train(net: Any, optimizer: ZerothOrderOptimizer, steps: int) -> list[tuple[float, ...]]:
    losses = []
    for _ in range(steps):
        losses.append(optimizer.estimate(net.loss).losses)
        optimizer.step()
    return losses


class TestOneStep:
    def test_a_vae_trains_as_with_fixed_noise_a_step(self) -> None:
        """The same curve as of a module that draws its noise once a step, by itself, from the same numbers."""
        step = [0]

        def fixed(like: Tensor) -> Tensor:
            start = Generators().seeded(3, step[0], 0).torch[0]
            generator = torch.Generator()
            generator.set_state(start)
            return torch.randn(like.shape, generator=generator)

        net, other = AutoEncoder(), AutoEncoder(fixed)
        losses, optimizer = train(net, attached(net), 150), attached(other)
        for number in range(150):
            step[0] = number
            assert train(other, optimizer, 1) == losses[number : number + 1]
        assert sum(map(sum, losses[-20:])) < 0.7 * sum(map(sum, losses[:20]))

    def test_projected_gradients_are_of_the_size_of_the_gradient(self) -> None:
        """Where each evaluation draws anew, the difference of two draws over 2 eps is added, 100 times as much."""
        net = AutoEncoder()
        optimizer = attached(net, eps=1e-4, num_queries=8)
        grads = torch.tensor(optimizer.estimate(net.loss).projected_grads)
        net.loss().backward()
        gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
        assert 0.2 < grads.square().mean().sqrt() / gradient.norm() < 4

    @pytest.mark.parametrize(
        "draw",
        [
            lambda: torch.rand(()).item(),
            lambda: F.dropout(torch.ones(64), 0.5).sum().item(),
            lambda: float(np.random.rand()),
            random.random,
        ],
    )
    def test_every_generator(self, draw: Callable[[], float]) -> None:
        net, drawn = AutoEncoder(torch.zeros_like), []

        def loss() -> Tensor:
            drawn.append((draw(), draw()))
            return net.loss() * (1 + drawn[-1][0])

        optimizer = attached(net)
        per_step = []
        for _ in range(3):
            drawn.clear()
            optimizer.estimate(loss)
            optimizer.step()
            assert len(drawn) >= 4 and len(set(drawn)) == 1  # the audit's too
            per_step.append(drawn[0])
        assert len(set(per_step)) == 3 and all(first != second for first, second in per_step)

    def test_everybody_else_draws_as_if_nothing_had_been_drawn(self) -> None:
        net = AutoEncoder()
        optimizer = attached(net)
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        expected = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        train(net, optimizer, 2)
        with pytest.raises(ZeroDivisionError):
            optimizer.estimate(lambda: torch.rand(()) * (1 / 0))
        assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected

    def test_run_and_stream_and_step_have_numbers_of_their_own(self) -> None:
        starts = [Generators().seeded(*numbers) for numbers in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
        for i, one in enumerate(starts):
            assert [one.equal(other) for other in starts] == [i == j for j in range(4)]
        net, found = AutoEncoder(), []
        for stream in (0, 1, 0):
            found.append(attached(net).estimate(net.loss, Share(stream=stream)).losses)
        assert found[0] == found[2] != found[1]


class TestRuns:
    def test_a_resumed_run_goes_on_bit_for_bit(self) -> None:
        net, resumed = AutoEncoder(), AutoEncoder()
        optimizer = attached(net)
        torch.manual_seed(1)
        train(net, optimizer, 4)
        resumed.load_state_dict(net.state_dict())
        fresh = attached(resumed)
        fresh.load_state_dict(optimizer.state_dict())
        torch.manual_seed(2)
        assert train(resumed, fresh, 4) == train(net, optimizer, 4)
        assert_same(weights(resumed), weights(net))

    def test_under_a_trainer(self, make_trainer: Any, make_regression: Any, regression_data: Any) -> None:
        def run(seed: int) -> dict[str, Tensor]:
            module = make_regression()
            own = module.training_step
            module.training_step = lambda batch, batch_idx: own(
                (batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]), batch_idx
            )
            torch.manual_seed(seed)
            trainer = make_trainer(max_steps=5, callbacks=[ZerothOrder(partial(MeZO, lr=0.01, seed=1))])
            trainer.fit(module, regression_data())
            return weights(module)

        assert_same(run(1), run(2))


class Noisy(nn.Module):
    """A layer that draws by a function, not by nn.Dropout, which evaluation mode would turn off."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        runs.append(self)
        return torch.tanh(F.dropout(self.linear(x), 0.3))


runs: list[nn.Module] = []


class Stack(nn.Module):
    """Layers that draw, and a head that draws after them."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            self.layers = nn.ModuleList([Noisy() for _ in range(4)])
            self.head = nn.Linear(4, 1)
        self.layers[:2].requires_grad_(False)
        self.head.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(F.dropout(x, 0.2))

    def loss(self) -> Tensor:
        return self(X + 0.1 * torch.randn_like(X)).square().mean()


class TestSharedWork:
    @pytest.mark.parametrize("keep_bytes", [0, 10**6])
    def test_layers_that_draw_are_passed_over_with_the_same_losses(self, keep_bytes: int) -> None:
        net, plain = Stack(), Stack()
        optimizer, other = attached(net), attached(plain)
        optimizer.evaluator.prefix.keep_bytes = keep_bytes
        other.evaluator.prefix.layers = ()
        train(net, optimizer, 1), train(plain, other, 1)
        runs.clear()
        found = train(net, optimizer, 3)
        assert runs.count(net.layers[0]) == 3  # once a step
        assert found == train(plain, other, 3)
        assert not optimizer.evaluator.prefix.kept

    def test_layers_that_draw_nothing_are_kept_beside_a_head_that_does(self) -> None:
        net, plain = Stack(), Stack()
        for stack in (net, plain):
            for layer in stack.layers:
                layer.forward = layer.linear.forward
            stack.loss = lambda stack=stack: stack(X).square().mean()  # type: ignore[method-assign]
        optimizer, other = attached(net), attached(plain)
        optimizer.evaluator.prefix.keep_bytes = 10**6
        other.evaluator.prefix.layers = ()
        assert train(net, optimizer, 4) == train(plain, other, 4)
        assert len(optimizer.evaluator.prefix.kept) == 1

    def test_stacked_evaluations_fall_back_where_the_network_draws(self) -> None:
        class Holder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = Stack().requires_grad_(True)
                self.noise = 0.0

            def loss(self) -> Tensor:
                return self.net(X + self.noise * torch.randn_like(X)).square().mean()

        stacked, plain = Holder(), Holder()
        optimizer, other = MeZO(stacked.named_parameters(), seed=3), attached(plain, lr=1e-6, num_queries=1)
        optimizer.attach(stacked, 2)
        with pytest.warns(UserWarning, match="the network draws random numbers"):
            found = train(stacked, optimizer, 3)
        assert found == train(plain, other, 3)

    def test_what_is_drawn_around_the_network_may_be_stacked(self) -> None:
        class Holder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                with torch.random.fork_rng():
                    torch.manual_seed(4)
                    self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()

            def loss(self) -> Tensor:
                return F.dropout(self.net(X.double() + 0.1 * torch.randn(8, 4)), 0.2).square().mean()

        stacked, plain = Holder(), Holder()
        optimizer, other = MeZO(stacked.named_parameters(), seed=3), attached(plain, lr=1e-6, num_queries=1)
        optimizer.attach(stacked, 2)
        for one, two in zip(train(stacked, optimizer, 3), train(plain, other, 3), strict=True):
            assert one == pytest.approx(two, rel=1e-9)
