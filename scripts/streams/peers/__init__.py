# SPDX-License-Identifier: Apache-2.0
"""One module a peer; each has ``run(workload, report) -> Result``."""
