import dataclasses
import sys
from importlib import import_module

import pytest

from bmoe_lightning.utils.registry import Registry

BASE = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Animal:
    name: str
    legs: int = 4
"""
BIRDS = """
import dataclasses
from zoo.base import Animal

@dataclasses.dataclass(frozen=True)
class Bird(Animal):
    name: str = "bird"
    legs: int = 2

class Stone:
    pass

@dataclasses.dataclass(frozen=True)
class NeedsLegs(Animal):
    name: str = "worm"
    legs: int = dataclasses.field(kw_only=True)
"""


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A registry with one built-in class, in a package on disk."""
    files = {"__init__": "", "base": BASE, "birds": BIRDS, "broken": "import not_installed_anywhere\n"}
    (tmp_path / "zoo").mkdir()
    for name, text in files.items():
        (tmp_path / "zoo" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Registry(
        kind="animal",
        base=lambda: import_module("zoo.base").Animal,
        group="zoo.animals",
        package="zoo",
        built_in={"bird": "birds:Bird"},
    )
    for name in [name for name in sys.modules if name.split(".")[0] == "zoo"]:
        del sys.modules[name]


def animal(name, kind):
    base = import_module("zoo.base").Animal
    return dataclasses.make_dataclass(kind, [("name", str, name)], bases=(base,), frozen=True)


def installed(folder, name, *lines):
    """A package that brings entry points."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[zoo.animals]\n" + "".join(f"{line}\n" for line in lines))


def test_names_import_nothing(zoo):
    assert zoo.names() == ("bird",)
    assert not [name for name in sys.modules if name.split(".")[0] == "zoo"]
    assert zoo.get("bird").legs == 2


def test_instances_pass_through(zoo):
    cat = animal("cat", "Cat")(legs=3)
    assert zoo.get(cat) is cat


def test_registered_classes_come_last(zoo):
    dog = animal("dog", "Dog")
    assert zoo.register(dog) is dog
    assert zoo.register(dog) is dog
    assert zoo.names() == ("bird", "dog")
    assert zoo.built_in_names() == ("bird",)
    assert zoo.get("dog") == dog()


def test_a_class_is_named_by_its_path(zoo):
    assert zoo.get("zoo.birds:Bird") == zoo.get("bird")


def test_entry_points_of_an_installed_package(zoo, tmp_path):
    installed(tmp_path, "theirs", "crow = zoo.birds:Bird")
    assert zoo.names() == ("bird", "crow")
    assert zoo.get("crow") == zoo.get("bird")


@pytest.mark.parametrize(
    ("packages", "name"),
    [(["bird = zoo.birds:Bird"], "bird"), (["crow = zoo.birds:Bird", "crow = zoo.birds:Other"], "crow")],
)
def test_entry_points_that_take_a_name_are_refused(zoo, tmp_path, packages, name):
    for number, line in enumerate(packages):
        installed(tmp_path, f"theirs{number}", line)
    with pytest.raises(ValueError, match=f"the entry point '{name}' .* takes the name of another animal"):
        zoo.names()


def test_a_name_is_given_once(zoo, tmp_path):
    installed(tmp_path, "theirs", "cat = zoo.birds:Bird")
    with pytest.raises(ValueError, match=r"the animal name 'cat' is taken by zoo\.birds:Bird; give Cat another name"):
        zoo.register(animal("cat", "Cat"))
    with pytest.raises(ValueError, match=r"'bird' is taken by zoo\.birds:Bird"):
        zoo.register(animal("bird", "Bird"))
    zoo.register(animal("dog", "Dog"))
    with pytest.raises(ValueError, match=r"'dog' is taken by .*:Dog"):
        zoo.register(animal("dog", "Poodle"))


def test_a_built_in_class_may_register_itself(zoo):
    bird = type(zoo.get("bird"))
    assert zoo.register(bird) is bird
    assert zoo.names() == ("bird",)


def test_a_name_is_checked_without_an_import(zoo):
    for name in ("bird", "nowhere.at.all:Bird"):
        zoo.check_name(name)
    with pytest.raises(ValueError, match="unknown animal 'brid', did you mean 'bird'"):
        zoo.check_name("brid")
    assert not [name for name in sys.modules if name.startswith("zoo")]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("brid", ValueError, "unknown animal 'brid', did you mean 'bird'"),
        ("xyzzy", ValueError, "unknown animal 'xyzzy'; there are bird, and `package.module:Class` names any other"),
        ("nowhere.at.all:Bird", ValueError, "'nowhere.at.all:Bird' names a module that cannot be imported"),
        ("zoo.nowhere:Bird", ValueError, "names a module that cannot be imported"),
        ("zoo.birds:Fish", ValueError, "the module 'zoo.birds' has no 'Fish'"),
        ("zoo.birds:Stone", TypeError, "an instance of zoo.base:Animal, got <zoo.birds.Stone"),
        ("zoo.birds:NeedsLegs", TypeError, r"'zoo.birds:NeedsLegs' \(NeedsLegs\) cannot be created without arguments"),
        ("zoo.broken:Bird", ModuleNotFoundError, "not_installed_anywhere"),
    ],
)
def test_what_cannot_be_found(zoo, name, error, message):
    with pytest.raises(error, match=message):
        zoo.get(name)
