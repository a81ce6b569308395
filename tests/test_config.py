"""The configuration: what is wrong is named with file, line, key, value, what was expected and the next step."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from opcua_detector.api import TagKind
from opcua_detector.config import Config, duration_ns, json_schema, load, parse, with_unit
from opcua_detector.errors import ConfigError
from opcua_detector.nodes import SIGNALS

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = sorted(p for p in (ROOT / "configs").glob("*.yaml") if not p.name.startswith("sim-"))
SECRET = "hunter2-in-clear"

GOOD = """\
version: 1
servers:
  - name: plant
    endpoint: opc.tcp://127.0.0.1:4840/
    policy: Basic256Sha256
    server_certificate: certs/plant.der
    user: operator
    password_env: PLANT_PASSWORD
    timeout: 4 s
groups:
  - name: fast
    server: plant
    period: 20 ms
    max_hold: 20
    tags:
      - {name: theta, node: "nsu=urn:plant;s=theta", unit: rad, eu_range: [-2, 2]}
      - name: u
        node: /Objects/2:Plant/2:u
        decimals: 1
      - {name: mode, node: "ns=2;i=7", kind: state}
monitors:
  - name: throttle
    group: fast
    tags: [theta, u]
    state_tag: mode
    methods: [transition, {name: onnx, model: nets/u.onnx}]
    windows: [1 s, 10 s]
    false_alarms_per_day: 0.5
    severity: 700
    model: models/throttle.npz
    outputs:
      server: plant
      base: "nsu=urn:results;s=throttle"
      signals: [Score, State]
      nodes: {Heartbeat: "ns=3;s=beat"}
store:
  path: state.db
  quota: 1.5 GB
  keep_rows: 14 d
plugins: [own/plugins]
"""

# (name, line of GOOD to replace, its replacement, key, value as shown, part of what was expected)
BAD = [
    ("two endpoints that are one", "    timeout: 4 s", '    endpoints: ["opc.tcp://127.0.0.1:4840/"]',
     "servers[0].endpoints", "", "differ"),
    ("redundant endpoint of another protocol", "    timeout: 4 s", '    endpoints: ["http://127.0.0.1/"]',
     "servers[0].endpoints", "", "opc.tcp://"),
    ("polls further apart than rows", "    max_hold: 20", "    sampling: poll 2 min", "groups[0].sampling",
     "'poll 2 min'", "one period apart"),
    ("polls all the time", "    max_hold: 20", "    sampling: poll 100 us", "groups[0].sampling",
     "'poll 100 us'", "'1 ms'"),
    ("polls without a unit", "    max_hold: 20", "    sampling: poll 2", "groups[0].sampling",
     "'poll 2'", "'poll 2 ms'"),
    ("sampling by another word", "    max_hold: 20", "    sampling: often", "groups[0].sampling", "'often'", "'poll'"),
    ("fail value that reads as no anomaly",
     '      nodes: {Heartbeat: "ns=3;s=beat"}', "      fail_values: {Score: 0.5}",
     "monitors[0].outputs.fail_values.Score", "0.5", "never just 'no anomaly'"),
    ("fail value of what says what happened",
     '      nodes: {Heartbeat: "ns=3;s=beat"}', "      fail_values: {State: 2}",
     "monitors[0].outputs.fail_values.State", "2", "says what happened"),
    ("allow list by namespace index", "    timeout: 4 s", '    writing: {allow: ["ns=2;s=a"]}',
     "servers[0].writing.allow[0]", "'ns=2;s=a'", "nsu="),
    ("lease of a minute and more", "    timeout: 4 s", "    writing: {lease: {period: 5 min}}",
     "servers[0].writing.lease.period", "", "60 s"),
    ("user certificate without its key", "    timeout: 4 s", "    user_certificate: u.der",
     "servers[0].user_certificate", "", "side by side"),
    ("metrics on no address", "plugins: [own/plugins]", "metrics: {listen: here}", "metrics.listen", "'here'", "9464"),
    ("log in a format that is none", "plugins: [own/plugins]", "log: {format: xml}", "log.format", "'xml'", "'json'"),
    ("misspelt key of the feedback", "    severity: 700", "    feedback: {expire: 3 d}", "monitors[0].feedback.expire",
     "'3 d'", "expires"),
    ("feedback in a mode that is none", "    severity: 700", "    feedback: {mode: free}", "monitors[0].feedback.mode",
     "'free'", "'bounded'"),
    ("range protected from feedback of an unknown tag", "    severity: 700", "    feedback: {protected: {w: [0, 1]}}",
     "monitors[0].feedback.protected.w", "'w'", "one of theta, u, mode"),
    ("range protected from feedback the wrong way round", "    severity: 700",
     "    feedback: {protected: {u: [1, 0]}}", "monitors[0].feedback.protected.u", "", "low < high"),
    ("expiry of feedback in a thousand years", "    severity: 700", "    feedback: {expires: 365000 d}",
     "monitors[0].feedback.expires", "", "3650 d"),
    ("misspelt key of a server", "    timeout: 4 s", "    timeut: 4 s", "servers[0].timeut", "'4 s'", "timeout"),
    ("misspelt key of a tag", "        decimals: 1", "        decimal: 1", "groups[0].tags[1].decimal", "1",
     "decimals"),
    ("misspelt key of a monitor", "    severity: 700", "    severty: 700", "monitors[0].severty", "700", "severity"),
    ("misspelt key of the store", "  quota: 1.5 GB", "  qouta: 1.5 GB", "store.qouta", "'1.5 GB'", "quota"),
    ("misspelt key of the outputs", "      base: \"nsu=urn:results;s=throttle\"", "      bas: \"x=y\"",
     "monitors[0].outputs.bas", "'x=y'", "base"),
    ("unknown section", "plugins: [own/plugins]", "plugin: [own/plugins]", "plugin", "", "plugins"),
    ("period without unit", "    period: 20 ms", "    period: 20", "groups[0].period", "20", "number with its unit"),
    ("period in an unknown unit", "    period: 20 ms", "    period: 20 msec", "groups[0].period", "'20 msec'", "ms, s"),
    ("unit in the wrong case", "    period: 20 ms", "    period: 20 MS", "groups[0].period", "'20 MS'", "ms, s"),
    ("negative period", "    period: 20 ms", "    period: -20 ms", "groups[0].period", "'-20 ms'", "'10 ms'"),
    ("sexagesimal period", "    period: 20 ms", "    period: 10:30", "groups[0].period", "630", "'10 ms'"),
    ("period too short", "    period: 20 ms", "    period: 20 us", "groups[0].period", "", "1 ms"),
    ("window without unit", "    windows: [1 s, 10 s]", "    windows: [1 s, 10]", "monitors[0].windows[1]", "10",
     "'10 ms'"),
    ("size in a unit of time", "  quota: 1.5 GB", "  quota: 1.5 s", "store.quota", "'1.5 s'", "GB"),
    ("time in a unit of size", "  keep_rows: 14 d", "  keep_rows: 14 GB", "store.keep_rows", "'14 GB'", "min, h, d"),
    ("endpoint of another protocol", "    endpoint: opc.tcp://127.0.0.1:4840/", "    endpoint: http://127.0.0.1/",
     "servers[0].endpoint", "'http://127.0.0.1/'", "opc.tcp://"),
    ("policy that is none", "    policy: Basic256Sha256", "    policy: Basic128Rsa15", "servers[0].policy",
     "'Basic128Rsa15'", "'Basic256Sha256'"),
    ("node that is none", "        node: /Objects/2:Plant/2:u", "        node: u", "groups[0].tags[1].node", "'u'",
     "NodeId"),
    ("node id without kind", "        node: /Objects/2:Plant/2:u", "        node: nsu=urn:a;u",
     "groups[0].tags[1].node",
     "'nsu=urn:a;u'", "browse path"),
    ("kind that is none", '      - {name: mode, node: "ns=2;i=7", kind: state}',
     '      - {name: mode, node: "ns=2;i=7", kind: sensor}', "groups[0].tags[2].kind", "'sensor'", "'measured'"),
    ("range the wrong way round", '      - {name: theta, node: "nsu=urn:plant;s=theta", unit: rad, eu_range: [-2, 2]}',
     '      - {name: theta, node: "nsu=urn:plant;s=theta", eu_range: [2, -2]}', "groups[0].tags[0].eu_range", "",
     "low < high"),
    ("decimals out of range", "        decimals: 1", "        decimals: -1", "groups[0].tags[1].decimals", "-1",
     "greater"),
    ("severity out of range", "    severity: 700", "    severity: 1001", "monitors[0].severity", "1001", "1000"),
    ("no false alarms at all", "    false_alarms_per_day: 0.5", "    false_alarms_per_day: 0",
     "monitors[0].false_alarms_per_day", "0", "greater than 0"),
    ("max_hold of nothing", "    max_hold: 20", "    max_hold: 0", "groups[0].max_hold", "0", "greater"),
    ("name with a blank", "  - name: throttle", "  - name: my throttle", "monitors[0].name", "'my throttle'",
     "pattern"),
    ("group of an unknown server", "    server: plant", "    server: plnt", "groups[0].server", "'plnt'",
     "one of plant"),
    ("monitor of an unknown group", "    group: fast", "    group: slow", "monitors[0].group", "'slow'", "one of fast"),
    ("monitor of an unknown tag", "    tags: [theta, u]", "    tags: [theta, v]", "monitors[0].tags[1]", "'v'",
     "one of theta, u, mode"),
    ("unknown state tag", "    state_tag: mode", "    state_tag: mod", "monitors[0].state_tag", "'mod'", "mode"),
    ("outputs on an unknown server", "      server: plant", "      server: hmi", "monitors[0].outputs.server", "'hmi'",
     "one of plant"),
    ("unknown signal", "      signals: [Score, State]", "      signals: [Score, Stat]",
     "monitors[0].outputs.signals[1]",
     "'Stat'", "StateText"),
    ("unknown signal among the nodes", '      nodes: {Heartbeat: "ns=3;s=beat"}', '      nodes: {Beat: "ns=3;s=beat"}',
     "monitors[0].outputs.nodes.Beat", "'Beat'", "Heartbeat"),
    ("node of a signal that is none", '      nodes: {Heartbeat: "ns=3;s=beat"}', "      nodes: {Heartbeat: beat}",
     "monitors[0].outputs.nodes.Heartbeat", "'beat'", "NodeId"),
    ("base that is no node", '      base: "nsu=urn:results;s=throttle"', "      base: throttle",
     "monitors[0].outputs.base", "'throttle'", "NodeId"),
    ("signals without base", '      base: "nsu=urn:results;s=throttle"', "", "monitors[0].outputs.base", "",
     "base beside signals"),
    ("tag named twice", "      - name: u", "      - name: theta", "groups[0].tags[1].name", "'theta'",
     "not used before"),
    ("methods as one word", "    methods: [transition, {name: onnx, model: nets/u.onnx}]", "    methods: transition",
     "monitors[0].methods", "'transition'", "a list such as"),
    ("method without a name", "    methods: [transition, {name: onnx, model: nets/u.onnx}]",
     "    methods: [{model: nets/u.onnx}]", "monitors[0].methods", "", "the key 'name'"),
    ("no method", "    methods: [transition, {name: onnx, model: nets/u.onnx}]", "    methods: []",
     "monitors[0].methods", "", "a list such as"),
    ("policy None without a word", "    policy: Basic256Sha256", "    policy: None", "servers[0].policy", "'None'",
     "insecure: true"),
    ("user without a password", "    password_env: PLANT_PASSWORD", "", "servers[0].user", "'operator'",
     "password_env"),
    ("another version of the format", "version: 1", "version: 2", "version", "2", "1"),
]


def broken(line, instead):
    """GOOD with one line replaced (taken out where `instead` is empty), and its number."""
    lines = GOOD.splitlines()
    at = len(lines) - 1 - lines[::-1].index(line) if line == "      server: plant" else lines.index(line)
    return "\n".join([*lines[:at], *([instead] if instead else []), *lines[at + 1:]]), at + 1


def refused(text, file="plant.yaml"):
    with pytest.raises(ConfigError) as caught:
        parse(text, file=file)
    return caught.value


def test_a_good_file_is_read_as_it_is_written():
    config = parse(GOOD)
    group, monitor, server = config.group("fast"), config.monitor("throttle"), config.server("plant")
    assert (group.period, group.max_hold, server.timeout) == (20_000_000, 20, 4_000_000_000)
    assert [t.tag().kind for t in group.tags] == [TagKind.MEASURED, TagKind.MEASURED, TagKind.STATE]
    assert group.tags[0].tag().eu_range == (-2.0, 2.0) and group.tags[1].tag().decimals == 1
    assert monitor.windows == (10**9, 10**10)
    assert [m["name"] for m in monitor.methods] == ["transition", "onnx"]
    assert config.store.quota == 1_500_000_000 and config.store.keep_rows == 14 * 86400 * 10**9


def test_defaults_of_the_rule_of_time_follow_the_period():
    group = parse(GOOD).group("fast")
    assert (group.sampling_ns, group.publishing_ns, group.lateness_ns) == (10_000_000, 20_000_000, 20_000_000)
    assert group.poll_ns is None


@pytest.mark.parametrize(("typed", "every"), [
    ("poll", 10_000_000), ("poll 2 ms", 2_000_000), ("poll 20ms", 20_000_000),
])
def test_polls_come_twice_per_period_or_as_often_as_asked(typed, every):
    group = parse(GOOD.replace("    max_hold: 20", f"    sampling: {typed}")).group("fast")
    assert (group.poll_ns, group.sampling_ns) == (every, 10_000_000)


@pytest.mark.parametrize(("period", "sampling", "every"), [
    ("20 ms", "5 ms", 5_000_000), ("20 ms", "0 ms", 10_000_000), ("20 ms", "30 ms", 10_000_000),
    ("1 ms", "0 ms", 10**6),
])
def test_what_cannot_be_reported_is_read_as_often_as_it_would_have_been_sampled(period, sampling, every):
    text = GOOD.replace("    period: 20 ms", f"    period: {period}")
    text = text.replace("    max_hold: 20", f"    sampling: {sampling}")
    assert parse(text).group("fast").fallback_poll_ns == every


@pytest.mark.parametrize(("line", "instead", "key", "value", "expected"), [case[1:] for case in BAD],
                         ids=[case[0] for case in BAD])
def test_a_wrong_file_is_refused_with_place_value_expectation_and_next_step(line, instead, key, value, expected):
    text, number = broken(line, instead)
    error = refused(text)
    message = str(error)
    assert (error.key, error.next_step != "") == (key, True)
    assert message.startswith("plant.yaml, line ") and f": {key}: " in message
    if instead:
        assert f"plant.yaml, line {number}:" in message
    assert (f"(got {value})" in message) == (value != "")
    assert "; expected " in message and expected in message.split("; expected ")[1].split("\n")[0]
    assert "\n  next step: " in message


@pytest.mark.parametrize(("line", "key"), [
    ("version: 1", "version"), ("    period: 20 ms", "groups[0].period"), ("    group: fast", "monitors[0].group"),
    ("    endpoint: opc.tcp://127.0.0.1:4840/", "servers[0].endpoint"),
    ("        node: /Objects/2:Plant/2:u", "groups[0].tags[1].node"),
])
def test_a_missing_key_is_named_with_the_section_it_belongs_to(line, key):
    error = refused(broken(line, "")[0])
    assert error.key == key
    assert re.search(r"plant\.yaml, line \d+: .*a key is missing; expected the key '", str(error))
    assert "next step: add it" in str(error)


def test_the_line_of_a_missing_key_is_that_of_its_section():
    text, _ = broken("        node: /Objects/2:Plant/2:u", "")
    assert "line 17:" in str(refused(text)) and text.splitlines()[16] == "      - name: u"


def test_a_misspelt_key_is_told_before_the_key_that_is_missing_for_it():
    error = refused(broken("    period: 20 ms", "    perriod: 20 ms")[0])
    assert error.key == "groups[0].perriod" and "1 more to follow" in str(error)


@pytest.mark.parametrize("key", ["servers", "groups", "monitors"])
def test_two_of_one_name_are_refused_where_the_second_stands(key):
    lines = GOOD.splitlines()
    start = lines.index(f"{key}:") + 1
    stop = next(i for i in range(start, len(lines)) if not lines[i].startswith("  "))
    twice = "\n".join([*lines[:stop], *lines[start:stop], *lines[stop:]])
    error = refused(twice)
    assert error.key == f"{key}[1].name" and f"line {stop + 1}:" in str(error)


def test_a_duplicate_key_is_refused_at_the_line_of_the_second():
    lines = GOOD.splitlines()
    at = lines.index("    max_hold: 20")
    error = refused("\n".join([*lines[:at + 1], "    max_hold: 30", *lines[at + 1:]]))
    assert error.key == "max_hold" and f"line {at + 2}" in str(error) and "twice" in str(error)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "just words"])
def test_a_file_that_is_no_mapping_is_refused(text):
    assert "start from a sample in configs/" in str(refused(text))


@pytest.mark.parametrize("text", [
    "version: [1", "version: 1\n\tservers: x", "a: b: c", "a: *nowhere", "---\na: 1\n---\nb: 2", "when: 2024-13-45",
    "a: &b [*b", "{[1, 2]: 3}", "a: \"open", "a: \x01",
], ids=repr)
def test_text_that_is_no_yaml_is_refused_with_the_place_and_without_quoting_it(text):
    message = str(refused(text))
    assert message.startswith("plant.yaml") and "not valid YAML" in message and "next step: " in message


def test_the_place_of_a_yaml_error_is_a_line_of_the_file():
    assert "plant.yaml, line 3, column" in str(refused("version: 1\nservers:\n  - a: b: c\n"))


# -- security ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instead", [
    f"    password: {SECRET}", f"    Password: {SECRET}", f"    pwd: {SECRET}", f"    password_env: {SECRET}",
    f"    password_env: PLANT_PASSWORD\n    secret: {SECRET}", f"    password_env: [{SECRET}]",
    f"    password_env: {{a: {SECRET}}}", f"    password: {SECRET}: x", f"    password: '{SECRET}",
])
def test_a_password_typed_into_the_file_is_refused_and_never_shown(instead):
    error = refused(broken("    password_env: PLANT_PASSWORD", instead)[0])
    for shown in (str(error), repr(error), repr(error.__dict__), error.next_step):
        assert SECRET not in shown


def test_a_password_in_the_endpoint_is_refused_and_never_shown():
    text, _ = broken("    endpoint: opc.tcp://127.0.0.1:4840/", f"    endpoint: opc.tcp://me:{SECRET}@127.0.0.1:4840/")
    error = refused(text)
    assert error.key == "servers[0].endpoint" and SECRET not in str(error) + repr(error.__dict__)


def test_the_password_comes_from_its_variable_and_is_in_no_text_of_the_config(monkeypatch):
    monkeypatch.setenv("PLANT_PASSWORD", SECRET)
    config = parse(GOOD)
    assert config.server("plant").password() == SECRET
    assert SECRET not in repr(config) + str(config) + config.model_dump_json()


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("PLANT_PASSWORD", raising=False)
    with pytest.raises(ConfigError, match=r"servers.plant.password_env.*'PLANT_PASSWORD'[\s\S]*next step: set PLANT"):
        parse(GOOD).server("plant").password()


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
def test_a_password_file_is_used_only_where_no_one_else_may_read_it(tmp_path):
    (tmp_path / "secret").write_text(SECRET + "\n", encoding="utf-8")
    text, _ = broken("    password_env: PLANT_PASSWORD", "    password_file: secret")
    server = parse(text, folder=tmp_path).server("plant")
    (tmp_path / "secret").chmod(0o644)
    with pytest.raises(ConfigError, match="mode 0600") as caught:
        server.password()
    assert SECRET not in str(caught.value)
    (tmp_path / "secret").chmod(0o600)
    assert server.password() == SECRET
    (tmp_path / "secret").unlink()
    with pytest.raises(ConfigError, match=r"servers\.plant\.password_file.*cannot be read"):
        server.password()


def test_no_encryption_needs_the_word_insecure_and_never_takes_a_user():
    none = GOOD.replace("policy: Basic256Sha256", "policy: None\n    insecure: true")
    error = refused(none)
    assert error.key == "servers[0].policy" and "never travels in clear" in str(error)
    without_user = none.replace("    user: operator\n    password_env: PLANT_PASSWORD\n", "")
    assert parse(without_user).server("plant").policy == "None"


def test_an_unchecked_server_needs_the_word_insecure():
    unchecked = GOOD.replace("server_certificate: certs/plant.der", "insecure: true")
    assert parse(unchecked).server("plant").server_certificate is None


# -- units and paths --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "ns"), [
    ("1 us", 1_000), ("10 ms", 10_000_000), ("10ms", 10_000_000), ("0.5 s", 500_000_000), (" 2 min ", 120 * 10**9),
    ("1 h", 3600 * 10**9), ("30 d", 30 * 86400 * 10**9), ("0 s", 0), ("12.5 ms", 12_500_000),
])
def test_durations_are_read_with_their_units(text, ns):
    assert duration_ns(text, key="--since") == ns


@pytest.mark.parametrize("text", ["", "10", "s", "ten s", "1e3 ms", "+1 s", "1 s 2 ms", "1,5 s", "nan s", ".5 s"])
def test_what_is_no_duration_is_refused_with_the_option_it_was_given_for(text):
    with pytest.raises(ConfigError, match="--since: wrong value") as caught:
        duration_ns(text, key="--since")
    assert repr(text) in str(caught.value) and "'10 ms'" in str(caught.value)


def test_relative_paths_are_taken_from_the_folder_of_the_file(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "plant.yaml").write_text(GOOD, encoding="utf-8")
    config = load(folder / "plant.yaml")
    monitor = config.monitor("throttle")
    assert config.server("plant").server_certificate == folder / "certs/plant.der"
    assert config.server("plant").pki == folder / "pki"
    assert monitor.model == folder / "models/throttle.npz"
    assert monitor.methods[1]["model"] == str(folder / "nets/u.onnx")
    assert config.store.path == folder / "state.db"
    assert config.plugins == (folder / "own/plugins",)


def test_absolute_paths_and_bundled_models_stay_as_they_are(tmp_path):
    text = GOOD.replace("nets/u.onnx", '"bundled:throttle"').replace("path: state.db", f"path: {tmp_path / 'a.db'}")
    config = parse(text, folder=tmp_path / "site")
    assert config.monitor("throttle").methods[1]["model"] == "bundled:throttle"
    assert config.store.path == tmp_path / "a.db"


def test_a_file_that_cannot_be_read_is_an_error_with_its_path(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: .*cannot be read[\s\S]*next step: check the path"):
        load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("a: ä".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: .*UTF-8"):
        load(tmp_path / "latin.yaml")


@pytest.mark.parametrize("pick", ["group", "monitor"])
def test_asking_for_an_unknown_group_or_monitor_lists_the_known_ones(pick):
    with pytest.raises(ConfigError, match=r"'nothing'.*expected one of (fast|throttle)"):
        getattr(parse(GOOD), pick)("nothing")


def test_only_nodes_named_in_the_config_are_written():
    outputs = parse(GOOD).monitor("throttle").outputs
    assert outputs.node_of() == {
        "Score": "nsu=urn:results;s=throttle.Score", "State": "nsu=urn:results;s=throttle.State",
        "Heartbeat": "ns=3;s=beat"}
    every = parse(broken("      signals: [Score, State]", "")[0]).monitor("throttle").outputs.node_of()
    assert set(every) == set(SIGNALS)
    only = parse(GOOD.replace('      base: "nsu=urn:results;s=throttle"\n      signals: [Score, State]\n', ""))
    assert only.monitor("throttle").outputs.node_of() == {"Heartbeat": "ns=3;s=beat"}


# -- schema and samples -----------------------------------------------------------------------------------------


def against(schema, rule, value, at="$"):
    """What a JSON value breaks of a schema: the keywords that ours uses, as a list of places."""
    if "$ref" in rule:
        return against(schema, schema["$defs"][rule["$ref"].rsplit("/", 1)[1]], value, at)
    if "anyOf" in rule:
        found = [against(schema, one, value, at) for one in rule["anyOf"]]
        return [] if any(not f for f in found) else found[0]
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
             "integer": int, "number": (int, float)}
    if "type" in rule and (not isinstance(value, types[rule["type"]])
                           or (isinstance(value, bool) and rule["type"] != "boolean")):
        return [f"{at}: no {rule['type']}"]
    checks = {
        "const": lambda x: value == x, "enum": lambda x: value in x, "pattern": lambda x: re.search(x, value),
        "minLength": lambda x: len(value) >= x, "maxLength": lambda x: len(value) <= x,
        "minItems": lambda x: len(value) >= x, "maxItems": lambda x: len(value) <= x,
        "minimum": lambda x: value >= x, "maximum": lambda x: value <= x, "exclusiveMinimum": lambda x: value > x,
        "required": lambda x: set(x) <= set(value),
    }
    found = [f"{at}: {key}" for key, check in checks.items() if key in rule and not check(rule[key])]
    if isinstance(value, dict):
        known = rule.get("properties", {})
        other = rule.get("additionalProperties", True)
        for key, item in value.items():
            if key in known:
                found += against(schema, known[key], item, f"{at}.{key}")
            elif other is False:
                found.append(f"{at}: unknown {key}")
            elif other is not True:
                found += against(schema, other, item, f"{at}.{key}")
    if isinstance(value, list):
        for i, item in enumerate(value):
            one = rule["prefixItems"][i] if "prefixItems" in rule else rule.get("items", {})
            found += against(schema, one, item, f"{at}[{i}]")
    return found


def content(text):
    return json.loads(json.dumps(yaml.safe_load(text)))


@pytest.mark.parametrize("text", [GOOD, *(p.read_text(encoding="utf-8") for p in SAMPLES)],
                         ids=["good", *(p.name for p in SAMPLES)])
def test_the_schema_accepts_what_the_config_accepts(text):
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert against(schema, schema, content(text)) == []


BEYOND_A_SCHEMA = ("group of", "monitor of", "unknown state", "outputs on", "unknown signal", "node", "base", "signals",
                   "tag named", "range", "policy None", "user", "period too short",
                   "endpoint of", "range protected", "expiry of", "fail value", "allow list", "lease of",
                   "two endpoints", "redundant", "polls further", "polls all")


@pytest.mark.parametrize("case", [c for c in BAD if not c[0].startswith(BEYOND_A_SCHEMA)], ids=lambda c: c[0])
def test_the_schema_refuses_what_the_config_refuses_where_a_schema_can(case):
    schema = json_schema()
    assert against(schema, schema, content(broken(case[1], case[2])[0])) != []


def test_every_default_that_the_schema_shows_can_be_typed_as_it_stands():
    schema = json_schema()
    shown = 0
    for name, section in {"Config": schema, **schema["$defs"]}.items():
        for key, rule in section.get("properties", {}).items():
            if rule.get("default") is not None:
                assert against(schema, rule, rule["default"], f"{name}.{key}") == []
                shown += 1
    assert shown > 25
    assert schema["$defs"]["ServerConfig"]["properties"]["timeout"]["default"] == "4 s"
    assert schema["$defs"]["StoreConfig"]["properties"]["quota"]["default"] == "2 GB"


def test_a_quantity_is_shown_in_its_largest_whole_unit():
    units = {"ms": 10**6, "s": 10**9, "min": 60 * 10**9}
    assert [with_unit(x, units) for x in (5 * 10**8, 9 * 10**10, 12 * 10**10, 0)] == ["500 ms", "90 s", "2 min", "0 s"]


@pytest.mark.parametrize("path", SAMPLES, ids=lambda p: p.name)
def test_every_sample_loads(path):
    config = load(path)
    assert isinstance(config, Config) and config.monitors
    for monitor in config.monitors:
        assert monitor.outputs is None or monitor.outputs.node_of()


def test_there_is_a_sample_of_each_simulated_process():
    assert {p.stem for p in SAMPLES} >= {"lorenz", "throttle"}

# -- the alarm budget of an operator position -----------------------------------------------------------------------


def test_the_budget_of_the_operator_position_is_shared_by_the_monitors_that_state_none() -> None:
    text = BUDGET.format(week="operator_alarms_per_week: 7", own="false_alarms_per_day: 0.4, ")
    shared = {m.name: m.false_alarms_per_day for m in parse(text).monitors}
    assert shared == pytest.approx({"a": 0.4, "b": 0.3, "c": 0.3})
    alone = {m.name: m.false_alarms_per_day for m in parse(BUDGET.format(week="", own="")).monitors}
    assert alone == {"a": 1.0, "b": 1.0, "c": 1.0}
    with pytest.raises(ConfigError, match=r"use up that of the operator position[\s\S]*more than 7"):
        parse(BUDGET.format(week="operator_alarms_per_week: 7", own="false_alarms_per_day: 1, "))


BUDGET = """
version: 1
{week}
servers: [{{name: plant, endpoint: "opc.tcp://127.0.0.1:4840/", policy: None, insecure: true}}]
groups: [{{name: g, server: plant, period: 100 ms, tags: [{{name: x, node: "ns=1;s=x"}}]}}]
monitors: [{{name: a, group: g, {own}tags: [x]}}, {{name: b, group: g}}, {{name: c, group: g}}]
"""
