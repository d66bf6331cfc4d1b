"""Reading, the network and the caller work at once, in order and within bounds."""

import threading
import time

import pytest

from imrcnn_d2.deploy.pipeline import ahead


def test_ahead():
    made = []

    def items():
        for number in range(100):
            made.append(number)
            yield number
            if number == 50:
                raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        list(ahead(items(), 4))
    assert list(ahead(range(100), 4)) == list(range(100))
    made.clear()
    few = ahead(items(), 4)
    assert next(few) == 0
    time.sleep(0.2)
    few.close()
    assert len(made) <= 7, "it does not run away"
    assert threading.active_count() < 10
