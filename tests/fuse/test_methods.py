"""Laws that every method keeps, one hand-computed case each, and agreement with a slow author in float64."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

from hubfusion.errors import RecipeError
from hubfusion.fuse.methods import METHODS, sparse
from hubfusion.fuse.methods.draws import draw
from hubfusion.fuse.methods.geometry import karcher, model_stock, slerp
from hubfusion.fuse.methods.linear import average, task_arithmetic
from hubfusion.fuse.methods.robust import geometric_median, krum_choice, median, multi_krum, sorted_rows, trimmed_mean
from hubfusion.fuse.methods.sparse import breadcrumbs, dare, dare_ties, della, sce, ties
from hubfusion.fuse.methods.spectral import iso_c, tsv
from hubfusion.fuse.methods.statistics import fisher, regmean
from tests import reference

SHAPES = [(), (1,), (3,), (2, 3), (200,)]
INPUTS = {"slerp": 2}
FULL = {  # options at which nothing is dropped
    "ties": {"density": 1.0}, "dare": {"density": 1.0}, "dare_ties": {"density": 1.0},
    "della": {"density": 1.0, "epsilon": 0.0}, "breadcrumbs": {"density": 1.0, "gamma": 0.0}, "sce": {"density": 1.0},
}  # fmt: skip
RANDOM = ("dare", "dare_ties", "della")


def given(name: str, shape: tuple[int, ...], k: int) -> dict[str, object]:
    """Options at full density, and statistics that the caller must bring."""
    rng = np.random.default_rng(1)
    more: dict[str, object] = dict(FULL.get(name, {}))
    if name == "fisher":
        more["fishers"] = rng.random((k, *shape)).astype(np.float32) + 0.1
    if name == "regmean" and len(shape) == 2:
        x = rng.standard_normal((k, 9, shape[1]))
        more["activations"] = list(np.swapaxes(x, 1, 2) @ x)
    return more


def deltas_for(name: str, shape: tuple[int, ...], seed: int = 0, dtype=np.float32):
    k = INPUTS.get(name, 5)
    return np.random.default_rng(seed).standard_normal((k, *shape)).astype(dtype)


def run(name: str, deltas, coefficients=None, **options):
    k = len(deltas)
    return np.asarray(METHODS[name].function(deltas, coefficients or [1.0] * k, **options))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("iso_c", "tsv")])
def test_agreement_k_equal_deltas_give_that_delta_at_full_density(name, shape):
    one = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    deltas = np.stack([one] * INPUTS.get(name, 5))
    k = len(deltas)
    coefficients = [1 / k] * k if name in ("task_arithmetic", "dare", "breadcrumbs") else [1.0] * k
    result = run(name, deltas, coefficients, **given(name, shape, k))
    assert result.shape == shape
    np.testing.assert_allclose(result, one, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["iso_c", "tsv"])
def test_spectral_methods_agree_where_a_parameter_is_no_matrix_and_keep_one_rank_one_delta(name):
    one = np.outer([1.0, 2.0], [3.0, 0.0, 4.0]).astype(np.float32)
    np.testing.assert_allclose(run(name, one[None]), one, atol=1e-6)
    np.testing.assert_allclose(run(name, np.stack([one[0]] * 4)), one[0], atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_zeros_give_zero(name, shape):
    deltas = deltas_for(name, shape) * 0
    assert not run(name, deltas, **given(name, shape, len(deltas))).any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_scale_doubling_every_delta_doubles_the_result(name, shape):
    deltas = deltas_for(name, shape)
    options = given(name, shape, len(deltas))
    once, twice = run(name, deltas, **options), run(name, deltas * 2, **options)
    np.testing.assert_allclose(twice, once * 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_order_of_inputs_does_not_matter(name, shape):
    deltas = deltas_for(name, shape)
    k = len(deltas)
    if name == "multi_krum" and shape in ((), (1,)):
        pytest.skip("numbers of one length have equal scores, and equal scores are settled by order")
    options, turned = given(name, shape, k), given(name, shape, k)
    coefficients = [1.0] * k if name in ("median", "trimmed_mean") else [0.5 + i for i in range(k)]
    for key in ("fishers", "activations"):
        if key in options:
            turned[key] = options[key][::-1]
    here = run(name, deltas, coefficients, **options)
    there = run(name, deltas[::-1], coefficients[::-1], **turned)
    np.testing.assert_allclose(here, there, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype, rtol", [(np.float32, 3e-5), (np.float64, 1e-9)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [n for n in METHODS if n not in RANDOM])
def test_every_method_agrees_with_its_slow_author_in_float64(name, shape, dtype, rtol):
    deltas = deltas_for(name, shape, seed=7, dtype=dtype)
    k = len(deltas)
    coefficients = [1.0] * k if name in ("median", "trimmed_mean") else [0.5 + i for i in range(k)]
    options = {n: v for n, v in given(name, shape, k).items() if n in ("fishers", "activations")}
    if name == "fisher":
        options["fishers"] = options["fishers"].astype(dtype)
    if name == "geometric_median":
        rtol = max(rtol, 1e-5)  # the smoothing
    if name == "regmean" and len(shape) != 2:
        expected = reference.average(deltas.astype(float), coefficients)
    else:
        statistics = [np.asarray(v, np.float64) for v in options.values()]
        expected = getattr(reference, name)(list(deltas.astype(np.float64)), coefficients, *statistics)
    if expected is None:
        pytest.skip("more directions than dimensions: the paper's closed form does not exist")
    result = run(name, deltas, coefficients, **options)
    assert result.dtype == dtype
    np.testing.assert_allclose(result, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", METHODS)
def test_deltas_are_never_modified(name):
    deltas = deltas_for(name, (4, 6))
    before = deltas.copy()
    run(name, deltas, None, **given(name, (4, 6), len(deltas)))
    assert np.array_equal(deltas, before)


@pytest.mark.parametrize("name", METHODS)
def test_the_same_code_runs_on_torch_tensors(name):
    torch = pytest.importorskip("torch")
    deltas = deltas_for(name, (6, 8))
    options = given(name, (6, 8), len(deltas))
    if name in FULL:
        options.update({k: v for k, v in METHODS[name].options.items() if k in FULL[name]})
    here = run(name, deltas, None, **options)
    if "fishers" in options:
        options["fishers"] = torch.from_numpy(options["fishers"])
    there = METHODS[name].function(torch.from_numpy(deltas), [1.0] * len(deltas), **options)
    assert isinstance(there, torch.Tensor) and there.dtype == torch.float32
    np.testing.assert_allclose(there.numpy(), here, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_every_docstring_states_formula_paper_departures_and_an_example(name):
    text = inspect.getdoc(METHODS[name].function) or ""
    assert "Paper:" in text and "Departures:" in text and ">>>" in text
    assert any(f"{symbol} = " in text for symbol in ("δ", "Δᵀ", "τ̂_i", "θ"))
    assert text.splitlines()[0].endswith(".") and METHODS[name].summary == text.splitlines()[0]


D = np.array([[4.0, -1.0, 0.0, 2.0], [2.0, 3.0, -6.0, -2.0], [-9.0, 1.0, 1.0, 0.5]])


def test_average_by_hand():
    assert average(D, [1, 1, 1]).tolist() == [-1.0, 1.0, -5 / 3, 1 / 6]
    assert average(D, [2, 1, 1]).tolist() == [0.25, 0.5, -1.25, 0.625]


def test_average_with_norms_clipped_to_the_median_by_hand():
    deltas = np.array([[3.0, 0.0], [0.0, 30.0], [0.0, -1.0]])
    assert average(deltas, [1, 1, 1], norm="clip").tolist() == pytest.approx([1.0, 2 / 3])
    assert average(deltas, [1, 1, 1], norm="equal").tolist() == pytest.approx([1.0, 0.0])


def test_task_arithmetic_by_hand():
    assert task_arithmetic(D, [1, 1, -1]).tolist() == [15.0, 1.0, -7.0, -0.5]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"density": 1.0}, [-9.0, 2.0, -6.0, 1.25]),
        ({"density": 1.0, "combine": "sum"}, [-9.0, 4.0, -6.0, 2.5]),
        ({"density": 1.0, "sign": "count"}, [3.0, 2.0, 0.0, 1.25]),
        ({"density": 0.5}, [-9.0, 2.0, -6.0, 2.0]),
        ({"density": 0.25}, [-9.0, 0.0, -6.0, 0.0]),
    ],
)
def test_ties_by_hand(options, expected):
    assert ties(D, [1, 1, 1], **options).tolist() == expected


def test_ties_with_coefficients_by_hand():
    assert ties(D, [3, 1, 1], density=1.0).tolist() == pytest.approx([14 / 4, 2.0, -6.0, 6.5 / 4])


def test_ties_keeps_every_entry_equal_to_the_threshold():
    assert ties(np.array([[1.0, 1.0, 1.0, 2.0]]), [1], density=0.5).tolist() == [1.0, 1.0, 1.0, 2.0]


def test_a_vote_that_cancels_exactly_gives_nothing():
    assert ties(np.array([[1.0], [-1.0]]), [1, 1], density=1.0).tolist() == [0.0]


def test_breadcrumbs_by_hand():
    delta = np.array([[5.0, -4.0, 3.0, 2.0, -1.0]])
    assert breadcrumbs(delta, [2], density=0.4, gamma=0.2).tolist() == [0, -8, 6, 0, 0]


def test_sce_by_hand():
    deltas = np.array([[1.0, 2.0, 0.0], [1.0, -1.0, 4.0]])  # variances 0, 2.25, 4; energies 4 and 17
    assert sce(deltas, [1, 1], density=2 / 3).tolist() == pytest.approx([0, 2, 4])
    assert sce(deltas, [1, 1], density=2 / 3, combine="sum").tolist() == pytest.approx([0, 4 / 21 * 2, 17 / 21 * 4])
    both = np.array([[3.0, 1.0], [1.0, -2.0], [-1.0, 0.0]])  # energies 10, 5, 1; the third is erased, then the first
    assert sce(both, [1] * 3, density=1.0).tolist() == pytest.approx([(10 * 3 + 5 * 1) / 15, -2.0])


def test_slerp_on_models_by_hand():
    base = np.array([1.0, 1.0])
    deltas = np.array([[1.0, -1.0], [-1.0, 1.0]])  # models (2, 0) and (0, 2)
    expected = 2**0.5 - base
    assert slerp(deltas, [1, 1], base=base).tolist() == pytest.approx(expected.tolist())


def test_slerp_and_karcher_agree_for_two_models_of_one_length_however_near():
    rng = np.random.default_rng(0)
    base = rng.standard_normal(500)
    for size in (1.0, 1e-3, 1e-6):
        one = base + size * rng.standard_normal(500)
        two = base + size * rng.standard_normal(500)
        two *= np.linalg.norm(one) / np.linalg.norm(two)
        deltas = np.stack([one, two]) - base
        here, there = slerp(deltas, [1, 3], base=base), karcher(deltas, [1, 3], base=base)
        np.testing.assert_allclose(here, there, atol=1e-7 * size)
        np.testing.assert_allclose(here + base, reference.slerp([one, two], [1, 3]), rtol=1e-9, atol=1e-9)


def test_karcher_of_three_axes_is_their_diagonal():
    assert karcher(np.eye(3) * 3, [1, 1, 1]).tolist() == pytest.approx([3**0.5] * 3)


@pytest.mark.parametrize("k", [2, 5])
def test_karcher_agrees_with_the_full_space_iteration(k):
    models = np.random.default_rng(k).standard_normal((k, 30)) + 0.5
    alphas = [1.0 + i for i in range(k)]
    np.testing.assert_allclose(karcher(models, alphas), reference.karcher(list(models), alphas), rtol=1e-6)


def test_model_stock_by_hand():
    deltas = np.array([[2.0, 0.0], [1.0, 3**0.5]])  # cosine 0.5: t = 2 · 0.5 / 1.5
    assert model_stock(deltas, [1, 1]).tolist() == pytest.approx([2 / 3 * 1.5, 2 / 3 * 3**0.5 / 2])
    assert not model_stock(np.array([[1.0], [-1.0]]), [1, 1]).any()


def test_model_stock_of_eight_nearly_orthogonal_inputs_hardly_moves():
    cosine = 0.01  # between finetunes of different tasks: t = 8 · 0.01 / (1 + 7 · 0.01) = 0.075
    deltas = np.linalg.cholesky(np.full((8, 8), cosine) + (1 - cosine) * np.eye(8))
    np.testing.assert_allclose(model_stock(deltas, [1] * 8), 0.0748 * deltas.mean(axis=0), rtol=1e-3)


def test_model_stock_does_not_depend_on_how_small_the_deltas_are():
    deltas = np.array([[2.0, 0.0], [1.0, 3**0.5]])
    np.testing.assert_allclose(model_stock(deltas * 1e-12, [1, 1]) * 1e12, model_stock(deltas, [1, 1]))


def test_iso_c_flattens_the_spectrum_and_keeps_its_sum():
    delta = np.random.default_rng(0).standard_normal((1, 4, 6))
    before = np.linalg.svd(delta[0])[1]
    np.testing.assert_allclose(np.linalg.svd(iso_c(delta, [1]))[1], [before.mean()] * 4)


def test_tsv_of_one_input_is_its_delta():
    delta = np.random.default_rng(0).standard_normal((1, 4, 6))
    np.testing.assert_allclose(tsv(delta, [1]), delta[0])


def test_trimmed_mean_and_median_by_hand():
    deltas = np.array([[1.0], [2.0], [4.0], [9.0], [100.0]])
    assert trimmed_mean(deltas, [1] * 5, trim=0.2, norm="keep").tolist() == [5.0]
    assert trimmed_mean(deltas, [1] * 5, trim=0.19, norm="keep").tolist() == [23.2]
    eight = np.array([[-100.0], [1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [100.0]])  # 0.2 of 8: one from each side
    assert trimmed_mean(eight, [1] * 8, trim=0.2, norm="keep").tolist() == [3.5]
    assert median(deltas, [1] * 5, norm="keep").tolist() == [4.0]
    assert median(deltas[:4], [1] * 4, norm="keep").tolist() == [3.0]
    assert trimmed_mean(deltas, [1] * 5, trim=0.2, norm="clip").tolist() == pytest.approx([10 / 3])


@pytest.mark.parametrize("k", range(1, 20))
def test_the_sorting_network_sorts_any_number_of_rows(k):
    rows = np.random.default_rng(k).integers(0, 9, (k, 50))
    assert np.array_equal(np.stack(sorted_rows(list(rows))), np.sort(rows, axis=0))


def test_the_geometric_median_of_a_right_triangle_is_its_fermat_point():
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    point = geometric_median(corners, [1, 1, 1], norm="keep")
    assert point.tolist() == pytest.approx([(3 - 3**0.5) / 6] * 2, abs=1e-6)


def test_the_geometric_median_is_not_moved_by_a_minority():
    deltas = np.vstack([np.ones((5, 3)), np.full((2, 3), 1e6)])
    np.testing.assert_allclose(geometric_median(deltas, [1] * 7, norm="keep"), 1.0, atol=1e-4)


def test_multi_krum_leaves_out_the_opposite_update_whatever_its_norm():
    deltas = np.array([[1.0, 0.1], [20.0, -2.0], [3.0, 0.3], [-2.0, 0.0]])
    assert krum_choice(deltas @ deltas.T, 1, 0, "equal") == [0, 1, 2]
    assert 1 not in krum_choice(deltas @ deltas.T, 1, 0, "keep")
    result = multi_krum(deltas, [1] * 4, faulty=1)
    assert result[0] == pytest.approx(2.5, rel=0.05)


def test_fisher_by_hand_and_its_floor():
    deltas, fishers = np.array([[1.0, 8.0], [5.0, 4.0]]), np.array([[3.0, 0.0], [1.0, 0.0]])
    assert fisher(deltas, [1, 1], fishers=fishers).tolist() == pytest.approx([2.0, 6.0])
    assert fisher(deltas, [1, 3], fishers=fishers).tolist() == pytest.approx([3.0, 5.0])


def test_regmean_reproduces_outputs_when_the_inputs_share_one_solution():
    rng = np.random.default_rng(0)
    true, x = rng.standard_normal((3, 4)), rng.standard_normal((2, 20, 4))
    grams = [m.T @ m for m in x]
    np.testing.assert_allclose(regmean(np.stack([true, true]), [1, 1], activations=grams, shrink=1.0), true)


def test_regmean_takes_each_input_where_its_data_lie():
    grams = [np.diag([1.0, 0.0]), np.diag([0.0, 1.0])]
    deltas = np.array([[[1.0, 2.0]], [[3.0, 4.0]]])
    assert regmean(deltas, [1, 1], activations=grams).tolist() == [[1.0, 4.0]]


def test_regmean_with_a_direction_without_data_gives_the_least_norm_solution():
    deltas = np.array([[[1.0, 2.0]]])
    assert regmean(deltas, [1], activations=[np.diag([2.0, 0.0])])[0].tolist() == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize("method", [dare, dare_ties, della])
def test_random_methods_keep_the_asked_share_and_the_expected_value(method):
    deltas = np.ones((1, 100, 1000), np.float32)
    result = method(deltas, [1.0], density=0.3)
    kept = result != 0
    assert kept.mean() == pytest.approx(0.3, abs=0.005)
    assert result.mean() == pytest.approx(1.0, abs=0.02)
    assert method(deltas, [1.0], density=0.3, seed=1).tolist() != result.tolist()


def test_dare_rescales_by_one_over_density():
    result = dare(np.full((1, 1000), 3.0), [1.0], density=0.25)
    assert set(result.tolist()) == {0.0, 12.0}


def test_della_keeps_large_entries_more_often_and_rescales_each_by_its_own_probability():
    size = np.tile(np.arange(1.0, 5.0, dtype=np.float32), (20_000, 1))
    result = della(size[None], [1.0], density=0.5, epsilon=0.4)
    assert (result != 0).mean(axis=0).tolist() == pytest.approx([0.35, 0.45, 0.55, 0.65], abs=0.015)
    factors = sorted(set((result / size)[result != 0].tolist()))
    assert np.unique(np.round(factors, 3)).tolist() == pytest.approx([1.538, 1.818, 2.222, 2.857], abs=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 9), (2, 3, 5), (2, 300)])
def test_della_of_one_input_entry_by_entry(shape, dtype):
    rng = np.random.default_rng(2)
    delta, draws = rng.standard_normal(shape).astype(dtype), rng.integers(0, 65536, shape)
    result = della(delta[None], [1.0], density=0.6, epsilon=0.3, draws=draws[None])
    columns = shape[-1] if shape else 1
    for row, drawn, got in zip(*(np.reshape(a, (-1, columns)) for a in (delta, draws, result)), strict=True):
        sizes = np.abs(row).astype(np.float32).view(np.uint32) >> 15
        for rank, column in enumerate(sorted(range(columns), key=lambda c: (sizes[c], c))):
            keep = round((0.6 - 0.15 + 0.3 * (rank + 0.5) / columns) * 65536)
            wanted = float(row[column]) * 65536 / keep if drawn[rank] < keep else 0.0
            assert float(got[column]) == pytest.approx(wanted, rel=1e-6)


def test_draws_are_the_same_in_whatever_pieces_they_are_asked_for():
    whole = draw(7, 2, "layer.weight", 0, 1000)
    for first, last in ((0, 1), (3, 10), (4, 4), (511, 1000)):
        assert draw(7, 2, "layer.weight", first, last).tolist() == whole[first:last].tolist()
    assert draw(7, 1, "layer.weight", 0, 50).tolist() != whole[:50].tolist()
    assert draw(7, 2, "layer.bias", 0, 50).tolist() != whole[:50].tolist()
    assert whole[:4].tolist() == [4176, 65408, 52747, 9242]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ties(D, [1, 1, 1], density=0), r"ties: density must be in \(0, 1\], got 0"),
        (lambda: ties(D, [1, 1, 1], scope="layer"), "ties: scope must be one of model, parameter, got 'layer'"),
        (lambda: ties(D, [1, 1, 1], sign="sum"), "ties: sign must be one of mass, count"),
        (lambda: dare(D, [1, 1, 1], density=1.5), r"dare: density must be in \(0, 1\], got 1.5"),
        (lambda: della(D, [1, 1, 1], density=0.9, epsilon=0.5), r"della: epsilon must be in \[0, 0.2\], got 0.5"),
        (lambda: breadcrumbs(D, [1] * 3, density=0.9, gamma=0.2), r"breadcrumbs: density must be in \(0, 0.8\]"),
        (lambda: slerp(D, [1, 1, 1]), "slerp: exactly 2 inputs are needed, got 3"),
        (lambda: model_stock(D[:1], [1]), "model_stock: at least 2 inputs are needed, got 1"),
        (lambda: median(D, [1, 2, 1]), "median: coefficients must be equal and positive"),
        (lambda: trimmed_mean(D, [1, 1, 1], trim=0.5), r"trimmed_mean: trim must be in \[0, 0.5\), got 0.5"),
        (lambda: multi_krum(D, [1, 1, 1], faulty=1), r"multi_krum: faulty must be in \[0, 0\] with 3 inputs, got 1"),
        (lambda: average(D, [1, 1, -2]), "average: coefficients must have a positive sum, got 0"),
        (lambda: average(D, [1, 1, 1], norm="max"), "norm must be one of keep, clip, equal, got 'max'"),
        (lambda: sce(D, [2, -1, 1]), r"sce: coefficients must not be negative, got \[2, -1, 1\]"),
        (lambda: fisher(D, [1, 1, 1]), "fisher: every input needs its diagonal"),
    ],
)
def test_what_a_method_does_not_allow_is_one_line_with_the_range(call, message):
    with pytest.raises(RecipeError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("columns", [1, 5, 700, 70_000])
def test_values_of_a_row_go_to_its_entries_in_the_order_of_their_size(columns):
    magnitudes = np.abs(np.random.default_rng(3).standard_normal((4, columns), np.float32)).round(1)  # many are equal
    values = np.arange(4 * columns, dtype=np.float32).reshape(4, columns)
    given = sparse.by_rank(magnitudes, values)
    order = np.argsort(given, axis=-1)
    assert (np.take_along_axis(given, order, axis=-1) == values).all()
    assert (np.take_along_axis(magnitudes, order, axis=-1) == np.sort(magnitudes)).all()
    assert (np.argsort(magnitudes, axis=-1, kind="stable") == order).all()
