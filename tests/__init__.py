"""The tests. A helper's assertions show what they compared, as those of a test do."""

import pytest

pytest.register_assert_rewrite("tests.small_runs")
