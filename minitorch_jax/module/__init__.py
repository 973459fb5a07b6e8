"""The classes that users write networks with: Module, Parameter, Buffer, random streams."""
