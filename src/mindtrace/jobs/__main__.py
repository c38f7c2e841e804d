"""`python -m mindtrace.jobs` is `mindtrace-jobs`."""

import sys

from mindtrace.jobs_command import main

sys.exit(main())
