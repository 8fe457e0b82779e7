"""MTP acceptance by position and domain, and the depth that pays by measured speed."""
