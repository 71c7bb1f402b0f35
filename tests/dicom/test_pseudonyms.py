"""Pseudonyms and the fractions derived from them."""

import re

import pytest

from dicom.pseudonyms import fraction, patient_key

KEY, OTHER_KEY = b"k" * 32, b"o" * 32


def test_a_patient_has_one_key_at_one_site():
    key, identified = patient_key(KEY, "12345", "", "1.2.3")
    assert identified
    assert re.fullmatch(r"p[0-9a-f]{16}", key)
    assert patient_key(KEY, " 12345 ", "", "9.9.9") == (key, True)
    assert patient_key(OTHER_KEY, "12345", "", "1.2.3")[0] != key
    assert patient_key(KEY, "12345", "OTHER HOSPITAL", "1.2.3")[0] != key
    assert "12345" not in key


@pytest.mark.parametrize("patient_id", ["", "   ", "UNKNOWN", "Anonymous", "0"])
def test_without_a_patient_the_study_gets_the_pseudonym(patient_id):
    key, identified = patient_key(KEY, patient_id, "", "1.2.3")
    assert not identified
    assert re.fullmatch(r"s[0-9a-f]{16}", key)
    assert patient_key(KEY, patient_id, "", "1.2.4")[0] != key


def test_different_parts_give_different_pseudonyms():
    assert patient_key(KEY, "1", "23", "")[0] != patient_key(KEY, "12", "3", "")[0]


def test_fractions_are_fixed_uniform_and_independent_of_the_pseudonym():
    keys = [patient_key(KEY, str(n), "", "")[0] for n in range(4000)]
    fractions = [fraction(KEY, key) for key in keys]
    assert fractions == [fraction(KEY, key) for key in keys]
    assert all(0 <= value < 1 for value in fractions)
    tenths = [sum(n / 10 <= value < (n + 1) / 10 for value in fractions) for n in range(10)]
    assert all(320 < count < 480 for count in tenths)
    assert fraction(OTHER_KEY, keys[0]) != fractions[0]


def test_a_short_key_is_refused():
    with pytest.raises(ValueError, match="at least 16"):
        patient_key(b"short", "1", "", "")
