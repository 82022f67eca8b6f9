"""The registry: exact names, no silent duplicates, plugins by entry points."""

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from connectors import (
    MLP,
    Connector,
    DuplicateNameError,
    UnknownNameError,
    VlmError,
    build_connector,
    list_connectors,
    recipe_of,
    register_connector,
)
from connectors import registry as registry_module
from connectors.base import CONNECTORS
from connectors.registry import Registry, nearest
from connectors.tokens import TokenSpec

Install = Callable[..., Registry[int]]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    """Make a registry that finds plugins, each an entry point to a module written here."""

    def make(code: str = "", **points: str) -> Registry[int]:
        (tmp_path / "some_plugin.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "some_plugin", raising=False)
        found = [EntryPoint(name, value, "things") for name, value in points.items()]
        monkeypatch.setattr(registry_module, "entry_points", lambda group: found if group == "things" else [])

        def accept(point: EntryPoint, loaded: object) -> list[tuple[str, int]]:
            assert isinstance(loaded, int)
            return [(point.name, loaded)]

        return Registry("thing", "things", {"built_in": "some_plugin"}, accept)

    return make


def test_names_are_exact_and_the_nearest_is_given(install: Install) -> None:
    things = install()
    things.register("pixel_shuffle", 1, "here")
    assert things.get("pixel_shuffle") == 1
    with pytest.raises(UnknownNameError, match=r"^no thing 'pixelshuffle'; did you mean pixel_shuffle\?$"):
        things.get("pixelshuffle")
    with pytest.raises(KeyError):
        things.get("pixel")


def test_nearest_names() -> None:
    known = ["mlp", "pixel_shuffle", "perceiver"]
    assert nearest("MLP", known) == "did you mean mlp?"
    assert nearest("mlp2x_gelu", known) == "did you mean mlp?"
    assert nearest("shuffle", known) == "did you mean pixel_shuffle?"
    assert nearest("zzz", known) == "known are mlp, perceiver, pixel_shuffle"
    assert nearest("", known) == "known are mlp, perceiver, pixel_shuffle"


def test_a_long_list_is_cut_by_its_first_words_and_counted() -> None:
    tags = [*(f"pool_{index:02}" for index in range(20)), "laion2b_e16", "openai"]
    shown = [*("laion2b_e16", "openai"), *(f"pool_{index:02}" for index in range(10))]
    assert nearest("", tags) == f"known are {', '.join(shown)} and 10 more"
    assert nearest("", tags[:13]) == f"known are {', '.join(tags[:12])} and 1 more"
    assert nearest("", tags[:12]) == f"known are {', '.join(tags[:12])}"
    assert nearest("zzz", []) == "none are known"


def test_a_name_is_taken_once(install: Install) -> None:
    things = install()
    things.register("mine", 1, "first")
    for thing in (1, 2):
        with pytest.raises(DuplicateNameError, match="thing 'mine' is registered already, by first; pick another"):
            things.register("mine", thing, "second")
    with pytest.raises(DuplicateNameError, match="'built_in' is registered already, by some_plugin"):
        things.register("built_in", 1, "elsewhere")
    assert things.get("mine") == 1


@pytest.mark.parametrize("name", ["", "a+b", "a,b", "a:b", "a=b", "a b"])
def test_a_name_that_no_recipe_could_say_is_refused(install: Install, name: str) -> None:
    with pytest.raises(VlmError, match="is empty or holds a space or one of"):
        install().register(name, 1, "here")


def test_names_match_a_shell_pattern(install: Install) -> None:
    things = install("seven = 7", plugged="some_plugin:seven")
    things.register("other", 1, "here")
    assert things.names() == ["built_in", "other", "plugged"]
    assert things.names("o*") == ["other"]


def test_plugins_are_found_by_entry_point_once(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    things = install("seven = 7", plugged="some_plugin:seven")
    assert things.get("plugged") == 7
    monkeypatch.setattr(registry_module, "entry_points", None)
    assert things.names("plug*") == ["plugged"]


@pytest.mark.parametrize("value", ["no_such_module:thing", "some_plugin:no_such_thing"])
def test_a_broken_plugin_is_named_each_time(install: Install, value: str) -> None:
    things = install(broken=value)
    for _ in range(2):
        with pytest.raises(UnknownNameError, match=f"plugin 'broken' = {value} cannot be loaded: .*; repair or unin"):
            things.names()


@pytest.mark.parametrize("code", ["raise RuntimeError('no GPU')", "1 / 0", "seven = = 7", "raise KeyError('a\\nb')"])
def test_a_plugin_that_fails_at_import_is_named(install: Install, code: str) -> None:
    with pytest.raises(UnknownNameError, match=r"^plugin 'broken' = some_plugin:seven cannot be loaded: \w+: .+; re"):
        install(code, broken="some_plugin:seven").names()


def test_a_plugin_cannot_take_a_built_in_name(install: Install) -> None:
    with pytest.raises(DuplicateNameError, match="'built_in' is registered already, by some_plugin"):
        install("seven = 7\neight = 8", built_in="some_plugin:eight", other="some_plugin:seven").names()


def test_a_built_in_module_registers_itself_when_asked_for(install: Install) -> None:
    things = install("import sys\nsys.things.register('built_in', 7, __name__)")
    sys.things = things  # type: ignore[attr-defined]
    try:
        assert things.names() == ["built_in"]
        assert things.get("built_in") == 7
    finally:
        del sys.things  # type: ignore[attr-defined]


PLUGIN = """
from connectors import Connector, Linear, register_connector

class Plain(Linear):
    pass

@register_connector("decorated")
class Decorated(Linear):
    pass

function = len
"""


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Install entry points of `vlm_encoders.connectors`, undone after the test."""
    before = set(CONNECTORS.names())

    def make(**points: str) -> None:
        (tmp_path / "a_plugin.py").write_text(PLUGIN)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "a_plugin", raising=False)
        monkeypatch.setattr(CONNECTORS, "_plugins_loaded", False)
        found = [EntryPoint(name, value, "vlm_encoders.connectors") for name, value in points.items()]
        monkeypatch.setattr(registry_module, "entry_points", lambda group: found if group == CONNECTORS.group else [])

    yield make
    # Not the whole tables: a built-in module that the test imported first registers itself only once.
    for name in {*CONNECTORS._things} - before:
        del CONNECTORS._things[name], CONNECTORS._origin[name]


def test_a_connector_plugin_touches_no_file_of_ours(plugin: Callable[..., None]) -> None:
    plugin(plain="a_plugin:Plain", anything="a_plugin:Decorated")
    assert {"plain", "decorated", "mlp"} <= set(list_connectors())
    spec = TokenSpec(4, 8, (2, 2))
    for name in ("plain", "decorated"):
        chain = build_connector(name, spec, 6)
        assert chain.out_spec(spec) == TokenSpec(4, 6, (2, 2))
        assert recipe_of(chain, 6) == name


def test_an_entry_point_that_is_no_connector_is_named(plugin: Callable[..., None]) -> None:
    plugin(wrong="a_plugin:function")
    with pytest.raises(VlmError, match="entry point wrong = a_plugin:function is not a Connector class"):
        list_connectors()


def test_a_subclass_does_not_pass_for_its_parent() -> None:
    class Changed(MLP):
        pass

    assert MLP.name == "mlp"
    assert Changed.name == ""
    with pytest.raises(VlmError, match="Changed has no registered name"):
        recipe_of(Changed(8, 6), 6)


def test_a_taken_connector_name_is_refused() -> None:
    def register(cls: type[Connector]) -> None:
        register_connector("mlp")(cls)

    with pytest.raises(DuplicateNameError, match=r"connector 'mlp' is registered already, by connectors\.mlp"):
        register(MLP)
    assert list_connectors() == sorted(list_connectors())
