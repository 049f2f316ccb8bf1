"""Updates in numbers, against NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from eos_monitor.verdicts.projector import UpdateProjector, movement
from tests.operators import Counted


def params_of(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in shapes]


def moved(params: list[nn.Parameter], scale: float, seed: int) -> np.ndarray:
    """Move the parameters in place and return by how much, flat."""
    g = torch.Generator().manual_seed(seed)
    old = np.concatenate([p.detach().double().numpy().reshape(-1) for p in params])
    with torch.no_grad():
        for p in params:
            p.add_((scale * torch.randn(p.shape, generator=g)).to(p.dtype))
    return np.concatenate([p.detach().double().numpy().reshape(-1) for p in params]) - old


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-6), (torch.bfloat16, 1e-2)], ids=str
)
def test_norm_and_projection(dtype: torch.dtype, rtol: float) -> None:
    """bfloat16 updates are themselves rounded when they are stored."""
    params = params_of((7, 3), (5,), dtype=dtype)
    motion = UpdateProjector(params)
    w = torch.randn(26, generator=torch.Generator().manual_seed(3))
    motion.project_on(w)
    motion.before()
    update = moved(params, 0.5, seed=2)
    found = movement(motion.after().tolist())
    theta = np.concatenate([p.detach().double().numpy().reshape(-1) for p in params])
    assert found.relative_update == pytest.approx(np.linalg.norm(update) / np.linalg.norm(theta), rel=rtol)
    assert found.projection == pytest.approx(float(update @ w.double().numpy()), rel=rtol, abs=10 * rtol)


def test_random_projection_is_linear_fixed_and_touches_every_parameter() -> None:
    params = params_of((3000,), (2, 2))
    motion, again = UpdateProjector(params, seed=5), UpdateProjector(params, seed=5)
    values = []
    for index in (0, 1):
        motion.before()
        again.before()
        with torch.no_grad():
            params[index].add_(1.0)
        values.append(movement(motion.after().tolist()).random_projection)
        assert movement(again.after().tolist()).random_projection == values[-1]
    motion.before()
    with torch.no_grad():
        params[0].sub_(2.0)
        params[1].add_(1.0)
    both = movement(motion.after().tolist()).random_projection
    assert min(abs(value) for value in values) > 1e-3
    assert both == pytest.approx(-2 * values[0] + values[1], rel=1e-4)


def test_without_a_vector_or_a_start_there_is_nothing() -> None:
    params = params_of((4,))
    motion = UpdateProjector(params)
    assert motion.after() is None
    motion.before()
    moved(params, 0.1, 0)
    assert movement(motion.after().tolist()).projection is None
    assert motion.after() is None


def test_parameters_are_only_read() -> None:
    params = params_of((4,), (2, 2))
    motion = UpdateProjector(params)
    values, versions = [p.detach().clone() for p in params], [p._version for p in params]
    motion.before()
    motion.after()
    assert [p._version for p in params] == versions
    assert all(torch.equal(p, value) for p, value in zip(params, values, strict=True))


def test_parameters_whose_data_is_replaced_are_still_followed() -> None:
    params = params_of((4,))
    motion = UpdateProjector(params)
    motion.before()
    params[0].data = params[0].data + 1.0
    assert motion.after() is None
    motion.before()
    with torch.no_grad():
        params[0].mul_(2.0)
    # An update by θ itself, of what is then 2θ.
    assert movement(motion.after().tolist()).relative_update == pytest.approx(0.5)


def test_complex_parameters_count_by_their_parts() -> None:
    p = nn.Parameter(torch.tensor([3.0 + 4.0j, 0.0j]))
    motion = UpdateProjector([p])
    motion.before()
    with torch.no_grad():
        p.add_(torch.tensor([3.0j, 4.0]))
    # ‖(3 + 7i, 4)‖² = 74
    assert movement(motion.after().tolist()).relative_update == pytest.approx(5 / 74**0.5)


def test_other_memory_layouts_are_read_in_the_order_of_all_vectors() -> None:
    p = nn.Parameter(torch.zeros(2, 3, 2, 2).to(memory_format=torch.channels_last))
    motion = UpdateProjector([p])
    motion.project_on(torch.arange(24.0))
    motion.before()
    with torch.no_grad():
        p[0, 1, 0, 0] = 2.0  # entry 4 of the flat vector
    assert movement(motion.after().tolist()).projection == 8.0


@pytest.mark.parametrize("sizes", [(2**17, 3), (2**17 + 1,), (3, 2**18)], ids=str)
def test_parts_of_a_large_run_add_up(sizes: tuple[int, ...]) -> None:
    """2¹⁷ coordinates are compared at a time."""
    params = params_of(*((size,) for size in sizes))
    motion = UpdateProjector(params)
    w = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(3))
    motion.project_on(w)
    motion.before()
    update = moved(params, 0.5, seed=2)
    values = motion.after()
    assert values.shape == (4,)
    found = movement(values.tolist())
    theta = np.concatenate([p.detach().double().numpy().reshape(-1) for p in params])
    assert found.relative_update == pytest.approx(np.linalg.norm(update) / np.linalg.norm(theta), rel=1e-5)
    # A sum of 1.3e5 to 2.6e5 products of single precision, of some 200 in length.
    assert found.projection == pytest.approx(float(update @ w.double().numpy()), abs=1e-2)


def test_the_random_vector_has_at_most_256_places_in_a_part() -> None:
    """Of an update by 1 in one coordinate after the other: 256 of 1,000 are seen, and all of 100."""
    for size, places in ((1000, 256), (256, 256), (100, 100)):
        (p,) = params_of((size,))
        motion = UpdateProjector([p])
        seen = 0
        for i in range(size):
            motion.before()
            with torch.no_grad():
                p[i] += 1.0
            seen += movement(motion.after().tolist()).random_projection != 0.0
        assert seen == places


def test_a_run_at_zero_has_updates_of_absolute_size() -> None:
    assert movement([4.0, 0.0, 1.0, 2.0]) == (2.0, 1.0, 2.0)
    assert movement([4.0, 16.0, float("nan"), 2.0]) == (0.5, None, 2.0)


def test_operators_of_a_step_do_not_grow_with_a_large_net() -> None:
    """Twice the coordinates, the same number of operators, and the numbers are those of plain arithmetic."""

    def operators(size: int) -> int:
        p = nn.Parameter(torch.full((size,), 2.0))
        projector = UpdateProjector([p, nn.Parameter(torch.ones(5))])
        projector.project_on(torch.ones(size + 5))
        with Counted() as counted:
            projector.before()
            with torch.no_grad():
                p.add_(0.5)  # exact in float32, and so are its sums below 2^24 units
            found = projector.after()
        assert found is not None
        size2 = size * 2.5**2 + 5
        assert found[:3].tolist() == pytest.approx([size / 4, size2, size / 2], rel=1e-6)
        return counted.count

    assert operators(1 << 25) <= 1.05 * operators(1 << 24)
