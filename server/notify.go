package server

import (
	"net"
	"os"
	"strings"
)

// Notify tells the service manager about the state of this process (the protocol
// of sd_notify): "READY=1", "STATUS=...". Without a manager it does nothing, and
// a manager that cannot be reached is none.
func Notify(lines ...string) {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return
	}
	if path[0] == '@' {
		path = "\x00" + path[1:]
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return
	}
	defer c.Close()
	for i, line := range lines {
		lines[i] = strings.ReplaceAll(line, "\n", " ")
	}
	_, _ = c.Write([]byte(strings.Join(lines, "\n")))
}
