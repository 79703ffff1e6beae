"""Several tokens per trip: tokens are drafted on this machine and checked together by the servers.

``draft_length`` decides how many, ``lookup`` and ``drafters`` find them, ``decoding`` checks them.
"""
