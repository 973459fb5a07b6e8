"""What a user writes a network with: Module, Parameter, Buffer, random streams."""
