"""Where KV lives while decoding. One file per tier; a tier is chosen when a prompt's prefill is forked for a method."""
