"""Recycle finetuned models: crawl → screen → fuse → evaluate → gate → publish → rank → notify.

Verbs and the frozen values between them. Nothing here knows what day it is, where it runs, or what ran before;
that is `bot`.
"""

__version__ = "0.1.0"
