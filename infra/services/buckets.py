"""Make the buckets named on the command line where they are missing, once the object store answers.

Endpoint and credentials come from the environment, as for every S3 tool. Exit 1 after two minutes without an answer.
"""

from __future__ import annotations

import sys
import time

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

PATIENCE_SECONDS = 120.0


def main() -> int:
    """Make the buckets."""
    client = boto3.client("s3", config=Config(connect_timeout=5, read_timeout=10, retries={"max_attempts": 1}))
    end = time.monotonic() + PATIENCE_SECONDS
    for bucket in sys.argv[1:]:
        while True:
            try:
                there = {one["Name"] for one in client.list_buckets()["Buckets"]}
                if bucket not in there:
                    client.create_bucket(Bucket=bucket)
                break
            except (BotoCoreError, ClientError) as error:
                if time.monotonic() > end:
                    print(f"the bucket {bucket} cannot be made: {error}", file=sys.stderr)
                    return 1
                time.sleep(0.5)
    return 0


if __name__ == "__main__":
    sys.exit(main())
