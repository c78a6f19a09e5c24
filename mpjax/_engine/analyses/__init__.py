"""What a jaxpr shows of its values: what they are made of, where they lead, what is added up."""
