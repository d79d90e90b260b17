import pytest

from bmoe_lightning.data.tasks import columns as C

ROW = {"id": 7, "text": " a ", "none": None, "blank": "  ", "flag": True, "place": 2, "list": ["a", "b"], "half": 0.5}


def test_values_are_returned_as_they_are():
    assert C.text_column(ROW, "text") == " a "
    assert C.id_column(ROW) == "7"
    assert C.id_column(ROW, "text") == " a "
    assert C.bool_column(ROW, "flag") is True
    assert C.index_column(ROW, "place", 3) == 2
    assert C.texts_column(ROW, "list") == ("a", "b")
    assert C.present({"zero": 0}, "zero") == 0
    assert C.name_of(" x\n", "label") == "x"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: C.text_column(ROW, "absent"), r"absent missing; the columns found are \['blank', 'flag'"),
        (lambda: C.text_column(ROW, "none"), "none is null; give a value, or drop the row"),
        (lambda: C.text_column(ROW, "blank"), "blank is empty"),
        (lambda: C.text_column(ROW, "list"), r"list must be a text, found the list \['a', 'b'\]"),
        (lambda: C.id_column(ROW, "flag"), "flag must be a text or an integer, found the boolean True"),
        (lambda: C.id_column(ROW, "half"), "half must be a text or an integer, found the number 0.5"),
        (lambda: C.id_column(ROW, "blank"), "blank is empty"),
        (lambda: C.bool_column(ROW, "place"), "place must be true or false, found the number 2"),
        (lambda: C.index_column(ROW, "place", 2), "place must be an integer from 0 to 1, found the number 2"),
        (lambda: C.index_column(ROW, "flag", 3), "flag must be an integer from 0 to 2, found the boolean True"),
        (lambda: C.index_column({"place": -1}, "place", 3), "found the number -1"),
        (lambda: C.texts_column(ROW, "text"), "text must be a list, found the text ' a '"),
        (lambda: C.texts_column({"list": []}, "list"), "list is empty"),
        (
            lambda: C.texts_column({"list": ["a", 3]}, "list"),
            "list must be a list of texts, found the number 3 among them",
        ),
        (lambda: C.texts_column({"list": {"a": 1}}, "list"), "list must be a list, found the object {'a': 1}"),
    ],
)
def test_refusals_name_the_column(call, message):
    with pytest.raises(ValueError, match=message):
        call()
