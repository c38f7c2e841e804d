"""`python -m mindtrace.jobs` is `mindtrace-jobs`."""

import sys

from mindtrace.jobs.cli import main

sys.exit(main())
