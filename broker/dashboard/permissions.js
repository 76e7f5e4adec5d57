// What the caller may do, as `get_caller` said. The broker decides; this only keeps people from trying in vain.

const compiled = new Map();

function matches(pattern, name) {
  if (!compiled.has(pattern)) {
    const escaped = pattern.split("*").map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    compiled.set(pattern, new RegExp(`^${escaped.join("[^]*")}$`));
  }
  return compiled.get(pattern).test(name);
}

/** Whether the caller may `send`, `receive` or `manage` a name. Of a caller who is not known yet, nothing is known. */
export function may(caller, verb, name) {
  return Boolean(caller) && caller[verb].some((pattern) => matches(pattern, name));
}
