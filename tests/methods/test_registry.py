"""Methods by name: strict, lazy and open."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest

from bmoe_lightning import methods
from bmoe_lightning.methods import MAP, LaplaceLPO, Method, get_method, method_names, register_method, registry


@dataclass(frozen=True)
class Mine(Method):
    """A method of this test."""

    name: str = "mine"
    label: str = "Mine"

    def log_probs(self, batch, state):
        return batch.logits.log_softmax(-1)


@pytest.fixture(autouse=True)
def _unchanged(monkeypatch):
    monkeypatch.setattr(registry._METHODS, "_registered", {})


class TestNames:
    def test_every_name_gives_a_method_of_that_name(self):
        for name in method_names():
            assert get_method(name).name == name
        assert len(set(method_names())) == len(method_names())

    def test_built_in_classes_are_importable_by_their_names(self):
        for name in registry.built_in_class_names():
            assert getattr(methods, name).__name__ == name
            assert name in dir(methods)
        with pytest.raises(AttributeError, match="no attribute 'Lapalce'"):
            _ = methods.Lapalce

    def test_an_instance_passes_through(self):
        method = LaplaceLPO(link="probit")
        assert get_method(method) is method

    def test_a_class_by_its_path(self):
        assert get_method("bmoe_lightning.methods.map:MAP") == MAP()

    @pytest.mark.parametrize(
        ("name", "kind", "message"),
        [
            ("laplace_lop", ValueError, "unknown method 'laplace_lop', did you mean 'laplace_lpo'?; there are map"),
            ("magic", ValueError, "`package.module:Class` names any other"),
            ("no_such_module:Mine", ValueError, "cannot be imported"),
            ("bmoe_lightning.methods.map:Mine", ValueError, "has no 'Mine'"),
            ("json:JSONDecoder", TypeError, "a method is a name or an instance"),
            (3, TypeError, "a method is a name or an instance"),
            (MAP, TypeError, "a method is a name or an instance"),
        ],
    )
    def test_what_is_no_method_is_refused(self, name, kind, message):
        with pytest.raises(kind, match=message.replace("?", r"\?")):
            get_method(name)

    def test_a_module_that_fails_to_import_something_else_says_so(self, tmp_path, monkeypatch):
        (tmp_path / "their_broken_module.py").write_text("import a_package_that_is_not_there\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
            get_method("their_broken_module:Mine")

    def test_listing_names_imports_no_torch(self):
        code = (
            "import sys; from bmoe_lightning.methods.registry import method_names\n"
            "assert 'map' in method_names()\n"
            "sys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestRegistering:
    def test_a_registered_method_is_known(self):
        assert register_method(Mine) is Mine
        assert get_method("mine") == Mine()
        assert method_names()[-1] == "mine"
        register_method(Mine)  # a module that is imported again
        assert register_method(MAP) is MAP  # a built-in class is known already

    def test_a_name_that_is_taken_is_refused(self):
        register_method(Mine)

        @dataclass(frozen=True)
        class Other(Mine):
            """Another method of the same name."""

        with pytest.raises(ValueError, match="the method name 'mine' is taken by"):
            register_method(Other)

        @dataclass(frozen=True)
        class Map(Mine):
            """A method with a built-in name."""

            name: str = "map"

        with pytest.raises(ValueError, match="the method name 'map' is taken by"):
            register_method(Map)

    def test_a_class_that_needs_options_is_refused(self):
        @dataclass(frozen=True)
        class Needy(Method):
            """A method without defaults."""

            def log_probs(self, batch, state):
                return batch.logits

        with pytest.raises(TypeError, match="cannot be created without arguments"):
            register_method(Needy)


class TestEntryPoints:
    """A package of somebody else's, as its installer leaves it: metadata and a module."""

    @pytest.fixture
    def install(self, tmp_path, monkeypatch):
        def installed(package, points):
            info = tmp_path / f"{package}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(f"[bmoe_lightning.methods]\n{points}\n")
            (tmp_path / f"{package}.py").write_text(
                "from dataclasses import dataclass\n"
                "from bmoe_lightning.methods import Method\n"
                "@dataclass(frozen=True)\n"
                "class Theirs(Method):\n"
                "    '''Their method.'''\n"
                "    name: str = 'theirs'\n"
                "    label: str = 'Theirs'\n"
                "    def log_probs(self, batch, state):\n"
                "        return (batch.logits / 2).log_softmax(-1)\n"
            )
            monkeypatch.syspath_prepend(tmp_path)

        return installed

    def test_a_package_brings_a_method(self, install):
        install("their_package", "theirs = their_package:Theirs")
        assert "theirs" in method_names()
        assert "their_package" not in sys.modules
        assert get_method("theirs").label == "Theirs"

    def test_a_package_may_not_take_a_name(self, install):
        install("greedy_package", "map = greedy_package:Theirs")
        with pytest.raises(ValueError, match=r"'map' \(greedy_package:Theirs\) .* takes the name of another method"):
            method_names()

    def test_two_packages_may_not_take_one_name(self, install):
        install("one_package", "theirs = one_package:Theirs")
        install("two_package", "theirs = two_package:Theirs")
        with pytest.raises(ValueError, match="one of the two packages has to rename"):
            get_method("theirs")
