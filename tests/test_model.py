"""A model file: what comes back is what was saved to the last bit, and nothing damaged is ever opened."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zipfile

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from opcua_detector import model as model_module
from opcua_detector.api import Tag, TagKind
from opcua_detector.engine import frames_of
from opcua_detector.errors import ModelFileError, ModelTagsError
from opcua_detector.model import FORMAT, load
from tests.plants import (
    PERIOD_NS,
    deviation_monitor,
    lorenz_fit,
    lorenz_monitor,
    lorenz_rows,
    monitor_of,
    noise_record,
    product_fit,
    scores,
)


@pytest.fixture(scope="module")
def model():
    return lorenz_fit()[0]


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "lorenz.npz"
    model.save(path)
    return path


def refused(path, content=None):
    """The text of the error that loading gives; it names the file and a next step."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        load(path)
    error = caught.value
    assert error.where == str(path) and error.next_step and "next step: " in str(error)
    return error.what


def parts(path):
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def written(path, arrays):
    """A file of these arrays, its digest made right again: as one would write it on purpose."""
    texts = {name: arrays[name] for name in ("header", "sha256")}
    rest = {name: array for name, array in arrays.items() if name not in texts}
    header = json.loads(texts["header"].tobytes())
    digest = model_module._digest(header, rest)
    np.savez_compressed(path, header=texts["header"], sha256=np.frombuffer(digest.encode(), np.uint8), **rest)
    return path


# -- round trip -------------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_with_its_id_and_gives_the_same_scores_to_the_last_bit(model, saved):
    again = load(saved)
    assert again.model_id == model.model_id == model.save(saved)
    assert again.sha256.startswith(again.model_id) and len(again.model_id) == 16
    record = lorenz_rows(2000, 7)
    ours = scores(lorenz_monitor(record.tags), record)
    method = type(lorenz_monitor(record.tags).methods[0])(again.methods[0], again.plan.columns)
    theirs = scores(type(lorenz_monitor(record.tags))("lorenz", again, [method], record.tags), record)
    assert np.isfinite(ours).sum() > 1800
    assert_array_equal(ours, theirs)


def test_the_model_of_the_sample_config_comes_back_with_the_same_verdicts_to_the_last_bit(tmp_path):
    path = tmp_path / "product.npz"
    product_fit().save(path)
    again = load(path)
    assert again.model_id == product_fit().model_id and again.calibration.views == product_fit().calibration.views
    record = lorenz_rows(2500, 7)
    record = dataclasses.replace(record, gap=(np.arange(2500) % 900 == 0).astype(np.uint8))
    seen = []
    for one in (product_fit(), again):
        monitor = monitor_of(one, record.tags)
        seen.append([(v.score, v.slow_score, v.r_trans, v.residual.tolist(), v.contribution.tolist(), v.quality)
                     for v in map(monitor.step, frames_of(record))])
    assert repr(seen[0]) == repr(seen[1])
    assert np.isfinite([row[:2] for row in seen[0]]).all(axis=1).sum() > 2400


def test_every_field_comes_back(tmp_path):
    tags = [Tag("x", "ns=2;s=x", unit="bar", eu_range=(-1.0, 4.5), decimals=2, description="pressure", path="A/B"),
            Tag("phi", kind=TagKind.ANGLE, turn=6.28), Tag("idle"), Tag("mode", kind=TagKind.STATE)]
    record = noise_record(6000, tags)
    record.values[:, 2] = 5.0
    record.values[:, 3] = np.arange(6000) // 3000
    model = deviation_monitor(record, state_tag="mode", windows=(10, 50)).model
    model.save(tmp_path / "m.npz")
    again = load(tmp_path / "m.npz")
    for field in dataclasses.fields(model):
        if field.name not in ("methods", "calibration", "span"):
            assert getattr(again, field.name) == getattr(model, field.name), field.name
    for field in dataclasses.fields(model.calibration):
        ours, theirs = getattr(model.calibration, field.name), getattr(again.calibration, field.name)
        assert_array_equal(ours, theirs) if isinstance(ours, np.ndarray) else ours == theirs
        assert type(ours) is type(theirs) and getattr(ours, "dtype", None) == getattr(theirs, "dtype", None)
    assert again.excluded == {"idle": "constant at 5"} and again.tags[0].eu_range == (-1.0, 4.5)


def test_the_id_changes_with_every_part_of_the_model(model):
    calibration = dataclasses.replace(model.calibration, limit=model.calibration.limit * (1 + 1e-15))
    changed = [
        dataclasses.replace(model, monitor="other"), dataclasses.replace(model, deltas=({"kind": "feedback"},)),
        dataclasses.replace(model, calibration=calibration), dataclasses.replace(model, span=model.span + 1),
        dataclasses.replace(model, tags=(dataclasses.replace(model.tags[0], unit="m"), *model.tags[1:])),
    ]
    assert len({one.model_id for one in [model, *changed]}) == 1 + len(changed)


# -- damage -----------------------------------------------------------------------------------------------------


def test_a_missing_file_is_told_with_the_command_that_makes_it(tmp_path):
    assert "cannot be read" in refused(tmp_path / "none.npz")
    with pytest.raises(ModelFileError, match="opcua-detector fit"):
        load(tmp_path)  # a folder


def test_a_file_truncated_at_any_length_is_refused(saved, tmp_path):
    content = saved.read_bytes()
    for length in np.linspace(0, len(content) - 1, 22).astype(int):
        refused(tmp_path / "cut.npz", content[:length])


def test_one_flipped_byte_is_refused_or_was_none_of_the_model(saved, model, tmp_path):
    content = saved.read_bytes()
    refusals = 0
    for at in np.random.default_rng(11).choice(len(content), 60, replace=False):
        broken = bytearray(content)
        broken[at] ^= 0xFF
        path = tmp_path / "flipped.npz"
        path.write_bytes(broken)
        try:
            opened = load(path)
        except ModelFileError as error:
            refusals += 1
            assert error.where == str(path) and error.next_step
        else:
            assert opened.model_id == model.model_id
    assert refusals >= 55


def test_a_flipped_byte_anywhere_in_the_directory_of_the_file_is_refused_or_harmless(tmp_path):
    monitor = deviation_monitor(noise_record(2000, ["a"]))
    small = tmp_path / "small.npz"
    monitor.model.save(small)
    content = small.read_bytes()
    directory = zipfile.ZipFile(small).start_dir
    path = tmp_path / "flipped.npz"
    for at in [*range(120), *range(directory, len(content), 5)]:
        broken = bytearray(content)
        broken[at] ^= 0xFF
        path.write_bytes(broken)
        try:
            assert load(path).model_id == monitor.model.model_id
        except ModelFileError as error:
            assert error.where == str(path)


def test_an_altered_array_is_refused_by_its_hash(saved, tmp_path):
    arrays = parts(saved)
    arrays["calibration/limit"] = arrays["calibration/limit"] * 2
    np.savez_compressed(tmp_path / "m.npz", **arrays)
    assert "altered" in refused(tmp_path / "m.npz")


def test_an_altered_header_is_refused_by_its_hash(saved, tmp_path):
    arrays = parts(saved)
    header = json.loads(arrays["header"].tobytes())
    header["period_ns"] *= 2
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez_compressed(tmp_path / "m.npz", **arrays)
    assert "altered" in refused(tmp_path / "m.npz")


@pytest.mark.parametrize("name", ["header", "sha256", "span", "calibration/grid"])
def test_a_file_that_lacks_a_part_is_refused(saved, tmp_path, name):
    arrays = parts(saved)
    del arrays[name]
    np.savez_compressed(tmp_path / "m.npz", **arrays)
    refused(tmp_path / "m.npz")


def test_an_unknown_format_is_refused_with_both_numbers(saved, tmp_path):
    arrays = parts(saved)
    header = json.loads(arrays["header"].tobytes()) | {"format": 99}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    assert f"model format 99 is not known, this version reads {FORMAT}" in refused(written(tmp_path / "m.npz", arrays))


@pytest.mark.parametrize("header", [[], "text", {}, {"format": 1}, {"format": 1, "methods": 3, "calibration": None}])
def test_a_header_that_describes_no_model_is_refused_even_with_a_right_hash(saved, tmp_path, header):
    arrays = parts(saved)
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    refused(written(tmp_path / "m.npz", arrays))


def test_a_file_with_pickled_objects_is_refused_and_they_are_never_made(saved, tmp_path):
    made = []

    class Trap:
        def __reduce__(self):
            return (made.append, ("executed",))

    arrays = parts(saved)
    np.savez(tmp_path / "m.npz", **(arrays | {"span": np.array([Trap()], dtype=object)}), allow_pickle=True)
    refused(tmp_path / "m.npz")
    np.save(tmp_path / "object.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    refused(tmp_path / "object.npy")
    assert made == []


def test_files_of_other_kinds_are_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.arange(5))
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("readme.txt", "no array")
    for content in (b"", b"PK\x03\x04", b"\x80\x04K\x01.", b"version: 1\n", buffer.getvalue(),
                    (tmp_path / "z.zip").read_bytes()):
        refused(tmp_path / "m.npz", content)


# -- writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(model, tmp_path, monkeypatch, step):
    path = tmp_path / "m.npz"
    model.save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(ModelFileError, match="No space left on device") as caught:
        dataclasses.replace(model, monitor="other").save(path)
    assert caught.value.where == str(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_told(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelFileError, match="cannot be written"):
        model.save(tmp_path / "file" / "m.npz")


def test_a_missing_folder_is_made(model, tmp_path):
    model.save(tmp_path / "new" / "folder" / "m.npz")
    assert load(tmp_path / "new" / "folder" / "m.npz").monitor == "lorenz"


# -- other tags -------------------------------------------------------------------------------------------------


def demanded(model, tags, period_ns=PERIOD_NS):
    with pytest.raises(ModelTagsError) as caught:
        model.require(tags, period_ns)
    assert caught.value.where == "monitor lorenz" and "fit the monitor again" in caught.value.next_step
    return caught.value.what


def test_a_missing_tag_is_named_with_those_the_model_needs(model):
    text = demanded(model, [Tag("x1"), Tag("x2")])
    assert "fitted for the tags x1, x3" in text and "x3 is not among" in text


def test_a_tag_of_another_kind_is_named_with_both_kinds(model):
    assert "tag x3 was fitted as measured, the config says counter" in demanded(
        model, [Tag("x1"), Tag("x3", kind=TagKind.COUNTER)])


def test_a_tag_in_another_unit_is_named_with_both_units_and_an_unnamed_unit_does_no_harm(model):
    in_bar = dataclasses.replace(model, tags=(Tag("x1", unit="bar"), Tag("x3", kind=TagKind.ANGLE, unit="deg")))
    deg = Tag("x3", kind=TagKind.ANGLE, unit="deg")
    assert "tag x1 was fitted in bar, the config says Pa" in demanded(in_bar, [Tag("x1", unit="Pa"), deg])
    assert "fitted in deg (full turn 360), the config says deg (full turn 1)" in demanded(
        in_bar, [Tag("x1", unit="bar"), dataclasses.replace(deg, turn=1.0)])
    in_bar.require([Tag("x1"), deg], PERIOD_NS)


def test_another_period_is_told_with_both_periods(model):
    assert "period of 10 ms, the group has 20 ms" in demanded(model, [Tag("x1"), Tag("x3")], 2 * PERIOD_NS)


def test_the_tag_that_chooses_the_state_is_needed_even_where_it_never_moved(model):
    with_state = dataclasses.replace(model, state_tag="mode")
    assert "mode is not among" in demanded(with_state, [Tag("x1"), Tag("x3")])
    with_state.require([Tag("x1"), Tag("x3"), Tag("mode", kind=TagKind.STATE)], PERIOD_NS)


def test_more_tags_in_any_order_do_no_harm(model):
    model.require([Tag("y"), Tag("x3"), Tag("z"), Tag("x1")], PERIOD_NS)
