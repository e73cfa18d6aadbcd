"""Numbers as people read them; expected texts are worked out by hand."""

from armillary.base.words import amount, clock, printable


def test_amounts() -> None:
    assert [amount(n) for n in (0, 7, 999, 1000, 12_345_678, 3.2e9, 5e13)] == [
        "0",
        "7",
        "999",
        "1 k",
        "12.3 M",
        "3.2 G",
        "50 T",
    ]
    assert amount(1536, "B") == "1.54 kB" and amount(12, "B") == "12 B"


def test_clocks() -> None:
    assert [clock(s) for s in (-1, 0.4, 65, 59.6, 3725)] == ["0:00", "0:00", "1:05", "1:00", "1:02:05"]


def test_what_a_model_writes_cannot_steer_a_terminal() -> None:
    assert printable("ö\n\tx\x1b[31m\r\x07") == "ö\n\tx\ufffd[31m\ufffd\ufffd"
