"""csrc and its launchers."""

import pytest

pytest.register_assert_rewrite("tests.csrc.device_checks")
