"""Values of JSON made up by hypothesis, and what a reader of them may do.

The suite tries a few, the same each time; `make fuzz` sets FUZZ_EXAMPLES, which draws others, and then what one takes
is held against SECONDS and MEBIBYTES.
"""

from __future__ import annotations

import json
import os
import resource
import time

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from megalora.errors import UserError

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))
SECONDS, MEBIBYTES = 2.0, 512


def examples(few: int) -> settings:
    """So many in the suite; FUZZ_EXAMPLES where that is set."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=EXAMPLES or few, deadline=None, suppress_health_check=checks)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


@st.composite
def edited(draw, body: dict) -> dict:
    """A value of JSON with one entry at any depth replaced or left out, or another value as a whole."""
    if draw(st.integers(0, 9)) == 0:
        return draw(JSON)
    body = json.loads(json.dumps(body))
    place = body
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        if isinstance(place[key], (dict, list)) and place[key] and draw(st.booleans()):
            place = place[key]
            continue
        if draw(st.booleans()):
            place[key] = draw(JSON)
        else:
            del place[key]
        return body


def ours_only(read) -> bool:
    """Whether `read()` gives something; the only error may be one line of ours."""
    begun, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read()
    except UserError as error:
        assert "\n" not in str(error)
        return False
    finally:
        if EXAMPLES:
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
            assert time.process_time() - begun <= SECONDS and grown <= MEBIBYTES
    return True
