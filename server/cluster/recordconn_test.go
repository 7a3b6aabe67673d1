package cluster

import (
	"crypto/tls"
	"net"
	"testing"

	"github.com/twinsan/twinsan/replication"
)

// Over a real session: what was sent before in one piece is read without waiting.
func TestRecordConnKnowsOfMore(t *testing.T) {
	l, a, b, _ := full(t)
	arrived := make(chan net.Conn, 1)
	l.crash("b")
	b.cfg.OnData = func(_ replication.NodeID, conn net.Conn) { arrived <- conn }
	b = l.restart("b")
	l.ready(b)
	out := must(a.Dial(testContext(t), 2))(t)
	defer out.Close()
	in := <-arrived
	defer in.Close()
	const size = 64 << 10 // what fits the buffers of the sockets: it is there before it is read
	if _, err := out.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	rc := in.(*tls.Conn).NetConn().(interface{ More() bool })
	p := make([]byte, 64<<10)
	together, reads := 0, 0
	for got := 0; got < size; reads++ {
		n, err := in.Read(p)
		if err != nil {
			t.Fatal(err)
		}
		got += n
		if rc.More() {
			together++
		}
	}
	if together < reads/2 {
		t.Errorf("of %d reads %d were followed by what had come already", reads, together)
	}
}
