"""Where keys and values lie while a model decodes: on the device, or in host memory behind a link."""
