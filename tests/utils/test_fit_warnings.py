import threading
import warnings

import pytest

from bmoe_lightning.utils.fit_warnings import FitWarning, collected_fit_warnings, warn_of_fit


def test_outside_a_fit_it_is_a_warning_at_the_caller():
    with pytest.warns(FitWarning, match="T is at a bound; add labels") as caught:
        warn_of_fit("T is at\n  a bound; add labels")
    assert caught[0].filename == __file__


def test_within_a_fit_each_sentence_is_collected_once():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with collected_fit_warnings() as outer:
            warn_of_fit("one")
            with collected_fit_warnings() as inner:
                warn_of_fit("two")
            warn_of_fit("one")
            warn_of_fit("three")
    assert (outer, inner) == (["one", "three"], ["two"])


def test_an_exception_ends_the_collection():
    with pytest.raises(KeyError), collected_fit_warnings():
        raise KeyError
    with pytest.warns(FitWarning):
        warn_of_fit("one")


def test_other_threads_do_not_see_it():
    def other():
        with pytest.warns(FitWarning):
            warn_of_fit("there")
        done.append(True)

    done = []
    with collected_fit_warnings() as here:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert (done, here) == ([True], [])


def test_an_empty_sentence_is_refused():
    with pytest.raises(ValueError, match="must say what was found"):
        warn_of_fit(" ")
