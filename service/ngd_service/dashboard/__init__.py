"""The dashboard: NiceGUI pages on the service's own application. Start at jobs.py and job.py.

It reads through `ngd_service.client.client` and nothing else, as any user could.
"""

from ngd_service.dashboard.mounting import mount

__all__ = ["mount"]
