package server

import (
	"runtime"
	"runtime/debug"
)

// Version is the version of the software, set by the linker in a release
// (-ldflags "-X github.com/twinsan/twinsan/server.Version=1.2.3").
var Version = "0.1.0-dev"

// BuildInfo says what this program was made from.
type BuildInfo struct {
	Version  string
	Revision string // of the repository, "unknown" when not built from one
	Go       string
}

// Build describes this program.
func Build() BuildInfo {
	b := BuildInfo{Version: Version, Revision: "unknown", Go: runtime.Version()}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				b.Revision = s.Value[:12]
			}
		}
	}
	return b
}
