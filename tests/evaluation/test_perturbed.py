"""A loss under Perturbed is the loss of perturbed weights, whatever reads them, and the weights stay as they are."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from networks import (
    NETWORKS,
    Loss,
    applied,
    assert_unchanged,
    mlp,
    perturbations,
    snapshot,
    values,
    written_to_the_weights,
)
from zolightning.directions.trials import FlippedBit
from zolightning.evaluation.find_reads import find_readers, find_unseen
from zolightning.evaluation.perturbed import Perturbed
from zolightning.evaluation.scratch import Scratch

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Loss]:
    make, loss = NETWORKS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval(), loss


class TestPerturbed:
    def test_the_loss_is_that_of_perturbed_weights(self, network: tuple[nn.Module, Loss]) -> None:
        module, loss = network
        before, plain = snapshot(module), loss(module)
        with Perturbed(perturbations(module)):
            exchanged = loss(module)
            assert_unchanged(module, before)
        with written_to_the_weights(module):
            expected = loss(module)
        assert torch.equal(exchanged, expected) and not torch.equal(exchanged, plain)
        assert torch.equal(loss(module), plain)

    def test_in_place_is_the_same(self, network: tuple[nn.Module, Loss]) -> None:
        module, loss = network
        before = snapshot(module)
        with Perturbed(perturbations(module)):
            exchanged = loss(module)
        with Perturbed(perturbations(module), in_place=module.parameters()):
            in_place = loss(module)
        assert_unchanged(module, before)
        assert torch.equal(in_place, exchanged)

    def test_a_mixture_is_the_same(self, network: tuple[nn.Module, Loss]) -> None:
        module, loss = network
        before = snapshot(module)
        with Perturbed(perturbations(module)):
            exchanged = loss(module)
        with Perturbed(perturbations(module), in_place=list(module.parameters())[::2]):
            mixed = loss(module)
        assert_unchanged(module, before)
        assert torch.equal(mixed, exchanged)

    def test_the_audit_finds_nothing_to_do(self, network: tuple[nn.Module, Loss]) -> None:
        module, loss = network
        before = snapshot(module)
        assert find_unseen(module.parameters(), lambda: loss(module)) == set()
        assert_unchanged(module, before)

    def test_watching_the_readers_only_is_the_same(self, network: tuple[nn.Module, Loss]) -> None:
        module, loss = network
        readers = find_readers(module, set(module.parameters()), lambda: loss(module))
        before, forwards = snapshot(module), [m.forward for m in module.modules()]
        with Perturbed(perturbations(module)):
            everywhere = loss(module)
        with Perturbed(perturbations(module), readers=readers):
            exchanged = loss(module)
        assert torch.equal(exchanged, everywhere)
        assert_unchanged(module, before)
        assert [m.forward for m in module.modules()] == forwards

    def test_scratch_is_shared_between_contexts(self, network: tuple[nn.Module, Loss]) -> None:
        module, loss = network
        scratch = Scratch()
        losses = []
        for _ in range(3):
            with Perturbed(perturbations(module), scratch=scratch):
                losses.append(loss(module))
        assert losses[0] == losses[1] == losses[2]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("name", ["mlp", "tied_head", "channels_last"])
    def test_other_dtypes(self, name: str, dtype: torch.dtype) -> None:
        make, loss = NETWORKS[name]
        module = make().eval().to(dtype)

        def cast_loss(module: nn.Module) -> Tensor:
            if name == "tied_head":
                return loss(module)
            inputs = values(3, 4) if name == "mlp" else values(2, 3, 7, 7).to(memory_format=torch.channels_last)
            return module(inputs.to(dtype)).double().square().mean()

        before = snapshot(module)
        with Perturbed(perturbations(module)):
            exchanged = cast_loss(module)
        assert_unchanged(module, before)
        with written_to_the_weights(module):
            assert torch.equal(cast_loss(module), exchanged)

    @pytest.mark.parametrize("padding", [False, True])
    def test_transformer_layer_with_a_fast_path(self, padding: bool) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padding else None
        loss = applied(values(2, 5, 8), src_key_padding_mask=mask)
        before = snapshot(layer)
        with Perturbed(perturbations(layer)):
            exchanged = loss(layer)
        # Under a function mode, even an empty one, torch takes the layer's slow path, which adds in another order
        with written_to_the_weights(layer), Perturbed({}):
            assert torch.equal(loss(layer), exchanged)
        with written_to_the_weights(layer):
            fast = loss(layer)
        assert_unchanged(layer, before)
        if not padding:  # where the fast path leaves zeros, and the slow one does not
            torch.testing.assert_close(exchanged, fast, rtol=1e-5, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("in_place", [False, True])
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_an_error_in_the_loss_leaves_the_weights_alone(
        self, dtype: torch.dtype, in_place: bool, error: type[BaseException]
    ) -> None:
        module = mlp().to(dtype)
        before = snapshot(module)
        with (
            pytest.raises(error),
            Perturbed(perturbations(module), in_place=module.parameters() if in_place else ()),
        ):
            module(values(3, 4).to(dtype))
            raise error
        assert_unchanged(module, before)
        assert not torch.overrides._get_current_function_mode()

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_error_while_perturbing_in_place_restores_what_was_done(self, error: type[BaseException]) -> None:
        class Failing:
            def add_to(self, weight: Tensor, out: Tensor) -> None:
                raise error("out of memory")

        module = mlp()
        before = snapshot(module)
        made = perturbations(module)
        made[module[3].weight] = Failing()
        with pytest.raises(error), Perturbed(made, in_place=module.parameters()):
            raise AssertionError("the context was entered")
        assert_unchanged(module, before)
        assert not torch.overrides._get_current_function_mode()

    def test_descriptions_of_a_parameter_do_not_count_as_reading(self) -> None:
        weight = nn.Parameter(values(3, 4))
        with Perturbed({weight: FlippedBit()}) as perturbed:
            described = (weight.shape, weight.dtype, weight.device, weight.requires_grad, weight.grad, weight.numel())
            assert described == (torch.Size([3, 4]), torch.float32, torch.device("cpu"), True, None, 12)
            assert (weight.size(0), weight.dim(), weight.stride(), len(weight), weight.ndim) == (3, 2, (4, 1), 3, 2)
            assert weight.is_leaf and weight.is_contiguous() and {weight: 1}[weight] == 1
        assert not perturbed.seen

    def test_other_tensors_pass_untouched(self) -> None:
        weight, other = nn.Parameter(values(3, 4)), nn.Parameter(values(3, 4, seed=1))
        with Perturbed({weight: FlippedBit()}) as perturbed:
            assert torch.equal(other + 1, other.data + 1) and other.view(-1).data_ptr() == other.data_ptr()
        assert not perturbed.seen

    def test_memory_is_that_of_the_largest_layer(self) -> None:
        net = nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)], nn.Linear(32, 64))
        scratch = Scratch()
        for _ in range(3):
            with Perturbed(perturbations(net), scratch=scratch):
                net(values(2, 32))
        (free,) = scratch._free.values()
        # A layer reads its weight and its bias at once; both buffers grew to what they were last used for
        assert sorted(len(buffer._bytes) for buffer in free) == [64 * 4, 64 * 32 * 4]

    def test_modules_see_perturbed_weights_in_hooks_too(self) -> None:
        net, seen = mlp(), []
        handle = net[0].register_forward_hook(lambda module, args, output: seen.append(module.weight * 1))
        with Perturbed(perturbations(net)):
            net(values(3, 4))
        handle.remove()
        with written_to_the_weights(net):
            assert torch.equal(seen[0], net[0].weight)


class TestAutocast:
    """Autocast keeps the casts it has made of parameters, which must never outlive a change of the weights."""

    def loss(self, net: nn.Module) -> Tensor:
        return net(values(3, 4)).double().square().mean()

    @pytest.mark.parametrize("in_place", ["nothing", "everything", "half"])
    def test_no_stale_casts(self, in_place: str) -> None:
        net = mlp()
        chosen = {"nothing": [], "everything": list(net.parameters()), "half": list(net.parameters())[:2]}[in_place]
        with written_to_the_weights(net), torch.autocast("cpu", torch.bfloat16):
            expected = self.loss(net)
        with torch.autocast("cpu", torch.bfloat16):
            plain = self.loss(net)  # fills the cache
            for _ in range(2):
                with Perturbed(perturbations(net), in_place=chosen):
                    assert torch.equal(self.loss(net), expected)
                assert torch.equal(self.loss(net), plain)

    def test_audit(self) -> None:
        net = mlp()
        with torch.autocast("cpu", torch.bfloat16):
            plain = self.loss(net)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert find_unseen(net.parameters(), lambda: self.loss(net)) == set()
            assert torch.equal(self.loss(net), plain)
