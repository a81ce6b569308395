"""Views: which channels are averaged with which, over what windows, and which of them rank, alarm or are only shown."""

from __future__ import annotations

import pytest

from opcua_detector.api import Channel
from opcua_detector.views import (
    LINEAR_WINDOWS,
    MOST_OF_RECORD,
    NONLINEAR_WINDOWS,
    PREDICTED,
    SLOW_WINDOW,
    Part,
    choose_windows,
    compose,
    is_nonlinear,
    method_labels,
)


def part(label, kinds, tags, *, predicts=False, nonlinear=None):
    """A method with every kind of channel on every tag, kind after kind as the methods have them."""
    channels = tuple(Channel(tag, tag, kind) for kind in kinds for tag in tags)
    return Part(label, channels, tuple(c.tag for c in channels), predicts, nonlinear)


def regression(tags, nonlinear):
    return part("regression", ("forecast", "relation"), tags, predicts=True, nonlinear=nonlinear)


def transition(tags, *, faithful=False):
    return part("transition", ("trans", "bound", "conf") if faithful else ("trans", "bound", "conf", "affine"), tags,
                predicts=True)


ONNX = part("onnx", ("forecast",), "ab")


def table(parts, windows=(*LINEAR_WINDOWS, SLOW_WINDOW), *, nonlinear=None, wanted=False):
    """(name, role) -> [(channels as kind.tag, windows in rows) of each view of that name]."""
    found = {}
    names = [f"{p.label}.{c.kind}.{c.tag}" for p in parts for c in p.channels]
    told = is_nonlinear(parts) if nonlinear is None else nonlinear
    for view in compose(parts, windows, told, wanted):
        groups = tuple(tuple(names[c] for c in group) for group in view.groups)
        found.setdefault((view.name, view.role), []).append((groups, tuple(windows[w] for w in view.windows)))
    return found


# -- linear plant -------------------------------------------------------------------------------------------------


def test_a_linear_plant_is_ranked_by_forecasts_and_relations_each_averaged_over_its_tags():
    found = table([regression("ab", False)])
    every = (("regression.forecast.a", "regression.forecast.b"), ("regression.relation.a", "regression.relation.b"))
    assert found[("all", "leading")] == [(every, LINEAR_WINDOWS)]
    assert found[("slow", "lamp")] == [(every, (SLOW_WINDOW,))]
    for tag in "ab":
        own = ((f"regression.forecast.{tag}",), (f"regression.relation.{tag}",))
        assert found[(f"{PREDICTED}{tag}", "beside")] == [(own, LINEAR_WINDOWS)]
    assert len(found) == 4


def test_transitions_explain_a_linear_plant_and_do_not_alarm():
    alone, with_it = (table(parts) for parts in ([regression("ab", False)],
                                                 [regression("ab", False), transition("ab")]))
    assert alone == with_it


def test_a_linear_plant_of_one_tag_needs_no_view_of_that_tag_beside_the_one_of_all():
    found = table([regression("a", False)])
    assert set(found) == {("all", "leading"), ("slow", "lamp")}


# -- nonlinear plant ----------------------------------------------------------------------------------------------


def test_a_nonlinear_plant_is_ranked_by_its_forecasts_over_all_windows():
    found = table([regression("ab", True), transition("ab")], NONLINEAR_WINDOWS)
    forecasts = (("regression.forecast.a", "regression.forecast.b"),)
    assert found[("all", "leading")] == [(forecasts, NONLINEAR_WINDOWS)]
    assert found[("quick", "beside")] == [(forecasts, (NONLINEAR_WINDOWS[0],))]
    assert found[("slow", "lamp")] == [(forecasts, (SLOW_WINDOW,))]
    assert found[(f"{PREDICTED}a", "beside")] == [((("regression.forecast.a",),), NONLINEAR_WINDOWS)]


def test_its_transitions_alarm_beside_it_each_tag_and_long_window_by_itself():
    found = table([regression("ab", True), transition("ab")], NONLINEAR_WINDOWS)
    for tag in "ab":
        paths = (tuple(f"transition.{kind}.{tag}" for kind in ("trans", "bound", "conf")),)
        assert found[(f"transition/{tag}", "beside")] == [(paths, (w,)) for w in NONLINEAR_WINDOWS[-2:]]
    assert not any("affine" in name for views in found.values() for groups, _ in views for g in groups for name in g)


@pytest.mark.parametrize("windows", [(10,), (3, 10)])
def test_a_quick_view_exists_only_where_there_is_a_slower_one(windows):
    assert (("quick", "beside") in table([regression("ab", True)], windows)) == (len(windows) > 1)


# -- methods that are no predictors of ours -----------------------------------------------------------------------


def test_transitions_alone_are_ranked_by_their_affine_maps():
    found = table([transition("ab")], NONLINEAR_WINDOWS)
    affine = (("transition.affine.a", "transition.affine.b"),)
    assert found[("all", "leading")] == [(affine, NONLINEAR_WINDOWS)]
    assert {role for name, role in found if name.startswith("transition/")} == {"beside"}


def test_the_papers_variant_alone_leads_by_each_tag_and_window_since_nothing_else_can():
    found = table([transition("ab", faithful=True)], NONLINEAR_WINDOWS)
    assert set(found) == {("transition/a", "leading"), ("transition/b", "leading")}
    assert [windows for _, windows in found[("transition/a", "leading")]] == [(w,) for w in NONLINEAR_WINDOWS[-2:]]


@pytest.mark.parametrize("nonlinear", [False, True])
def test_a_graph_trained_elsewhere_alarms_beside_our_predictors_on_either_plant(nonlinear):
    found = table([regression("ab", nonlinear), ONNX])
    longest = ((LINEAR_WINDOWS[-1],), (SLOW_WINDOW,))
    for tag in "ab":
        assert found[(f"onnx/{tag}", "beside")] == [(((f"onnx.forecast.{tag}",),), window) for window in longest]
    leading = found[("all", "leading")]
    assert not any(name.startswith("onnx") for groups, _ in leading for group in groups for name in group)


def test_a_graph_alone_leads():
    assert {role for _, role in table([ONNX])} == {"leading"}


def test_the_order_of_the_methods_changes_the_numbers_of_channels_and_nothing_else():
    first = table([regression("ab", False), ONNX])
    last = table([ONNX, regression("ab", False)])
    assert first == last


def test_checks_have_their_own_limit_each_by_itself_over_the_shortest_window():
    checks = part("checks", ("range", "rate"), "ab")
    found = table([regression("ab", False), checks])
    shortest = LINEAR_WINDOWS[:1]
    assert found[("checks/a", "fixed")] == [((("checks.range.a",),), shortest), ((("checks.rate.a",),), shortest)]
    assert {role for name, role in found if name.startswith("checks/")} == {"fixed"}


def test_a_method_says_how_many_channels_it_has_in_a_view():
    parts = [regression("ab", True), transition("ab"), ONNX]
    views = compose(parts, NONLINEAR_WINDOWS, True, False)
    of = {view.name: dict(method_labels(parts, view)) for view in views}
    assert of["all"] == {"regression": 2} and of["transition/a"] == {"transition": 3} and of["onnx/b"] == {"onnx": 1}


def test_terms_are_all_pairs_of_group_and_window_group_after_group():
    (view,) = [v for v in compose([regression("ab", False)], (3, 10), False, False) if v.name == "all"]
    assert view.terms == (((0, 1), 0), ((0, 1), 1), ((2, 3), 0), ((2, 3), 1))


# -- windows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nonlinear", "expected"), [
    (False, tuple(sorted({*LINEAR_WINDOWS, SLOW_WINDOW}))), (True, tuple(sorted({*NONLINEAR_WINDOWS, SLOW_WINDOW})))])
def test_windows_by_default_are_those_of_the_plant_and_a_slow_one(nonlinear, expected):
    assert choose_windows((), nonlinear, 100_000) == expected


@pytest.mark.parametrize("rows", [100_000, 4000, 3999, 400, 399, 100, 39, 12])
@pytest.mark.parametrize("nonlinear", [False, True])
def test_windows_shrink_with_a_short_record_to_a_quarter_of_it(rows, nonlinear):
    assert MOST_OF_RECORD == 4
    found = choose_windows((), nonlinear, rows)
    default = {*(NONLINEAR_WINDOWS if nonlinear else LINEAR_WINDOWS), SLOW_WINDOW}
    assert found and max(found) <= rows / 4 and list(found) == sorted(set(found))
    assert set(found) == {w for w in default if w <= rows / 4} or found == (rows // 4,)


def test_windows_that_were_asked_for_are_taken_as_far_as_the_record_goes():
    assert choose_windows((500, 20), False, 100_000) == (20, 500)
    assert choose_windows((20, 500), True, 1000) == (20,)
    assert choose_windows((500,), True, 1000) == (250,)


def test_windows_that_were_asked_for_all_rank_on_a_linear_plant_too():
    found = table([regression("ab", False)], (20, 500), wanted=True)
    assert found[("all", "leading")][0][1] == (20, 500)
    assert found[("slow", "lamp")][0][1] == (500,)


# -- the gate -----------------------------------------------------------------------------------------------------


def test_the_plant_is_nonlinear_where_a_method_says_so_or_none_can_tell():
    assert is_nonlinear([ONNX, regression("a", True), transition("a")])
    assert not is_nonlinear([ONNX, regression("a", False), transition("a")])
    assert is_nonlinear([transition("a")]) and is_nonlinear([])
