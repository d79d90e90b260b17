import pytest

from bmoe_lightning.data.tasks.medmcqa import MedMCQA
from bmoe_lightning.data.tasks.mmlu import MMLU


@pytest.mark.parametrize(("kind", "column"), [(MMLU, "subject"), (MedMCQA, "subject_name")])
class TestSubjects:
    def rows(self, column):
        return iter([(f"line {number}", {column: name}) for number, name in enumerate(("a", "b", "", "c", "a"))])

    def test_all_rows_without_subjects(self, kind, column):
        assert len(list(kind().select(self.rows(column)))) == 5

    def test_those_named_and_those_without_a_subject(self, kind, column):
        found = kind(subjects=["a", "c"]).select(self.rows(column))
        assert [row[column] for _, row in found] == ["a", "", "c", "a"]

    def test_absent_subjects_are_named_with_those_there_are(self, kind, column):
        with pytest.raises(ValueError, match="no row has the subject 'd'; the subjects are a, b, c"):
            list(kind(subjects=("a", "d")).select(self.rows(column)))
        unnamed = iter([("line 1", {column: ""})])
        assert len(list(kind(subjects=("d",)).select(unnamed))) == 1  # a split without subjects, for training

    def test_a_row_without_the_column_is_refused(self, kind, column):
        with pytest.raises(ValueError, match=f"line 1: {column} must be a text, found null"):
            list(kind(subjects=("a",)).select(iter([("line 1", {})])))

    def test_one_string_is_refused(self, kind, column):
        with pytest.raises(TypeError, match=r"subjects must be a tuple of names, found 'a'; write \('a',\)"):
            kind(subjects="a")
