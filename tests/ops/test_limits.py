"""What Python says that the kernels take is what they were built for."""

import pytest
import torch

from megalora.ops import extension, limits

pytestmark = pytest.mark.skipif(not extension.load(), reason="no megalora._C: " + extension.REMEDY)


def test_python_has_the_limits_of_the_library():
    import megalora._C

    ours = {name.lower(): value for name, value in vars(limits).items() if name.isupper()}
    assert ours == megalora._C.build_info()["limits"]


def test_skinny_linear_takes_its_most_rows_and_no_more():
    x, weight = torch.randn(limits.MOST_SKINNY_ROWS + 1, 40), torch.randn(7, 40)
    got = torch.ops.megalora.skinny_linear(x[:-1], weight, None)
    torch.testing.assert_close(got, x[:-1] @ weight.t())
    with pytest.raises(RuntimeError, match="x_MI.size\\(0\\) <= kMostSkinnyRows"):
        torch.ops.megalora.skinny_linear(x, weight, None)
