//go:build simruntime

package sim

import _ "unsafe" // for linkname

// runtimeSeed seeds what the runtime draws (overlay).
//
//go:linkname runtimeSeed
func runtimeSeed(seed uint64)

const deterministic = true
