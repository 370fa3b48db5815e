"NDIF's API with its own key check, but keys from NDIF_TEST_KEYS (UUIDs, commas), not from a Postgres table."

import os

# before nnsight, whose .save on every object breaks this import; without it bodies over 1 MB get a 400
import anyio._backends._asyncio  # noqa: F401
from ndif.common.providers.postgres import PostgresProvider

KEYS = {k for k in os.environ.get("NDIF_TEST_KEYS", "").split(",") if k}


async def fetch(query, key):
    return [{"user_id": "1", "email": "test@example.com", "user_tag": "trusted"}] if str(key) in KEYS else []


if KEYS:
    PostgresProvider.enabled = classmethod(lambda cls: True)
    PostgresProvider.fetch = staticmethod(fetch)

from ndif.services.api.app import app  # noqa: E402,F401
