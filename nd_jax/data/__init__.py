"""Prompts, tokenizers and the batch pipeline. Everything here is numpy on the host; nothing touches a device."""
