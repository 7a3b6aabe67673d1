package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/spf13/cobra"

	"github.com/twinsan/twinsan/api"
	"github.com/twinsan/twinsan/server"
)

func (a *app) serveCommand() *cobra.Command {
	var witness bool
	var debug string
	c := &cobra.Command{
		Use: "serve", Short: "Run this node until SIGTERM", Args: arguments(),
		RunE: func(c *cobra.Command, _ []string) error {
			config, err := server.LoadConfig(a.configPath())
			if err != nil {
				return err
			}
			return a.serve(c.Context(), config, witness, debug)
		},
	}
	c.Flags().BoolVar(&witness, "witness", false, "refuse to run unless this machine joined as a witness")
	c.Flags().StringVar(&debug, "debug-addr", "", "address for pprof, without authentication")
	if err := c.Flags().MarkHidden("debug-addr"); err != nil {
		panic(err)
	}
	return c
}

// serve joins a node and the API, and runs both until ctx ends or the node fails.
func (a *app) serve(ctx context.Context, config *server.Config, witness bool, debug string) error {
	var level slog.Level
	if err := level.UnmarshalText([]byte(config.Log.Level)); err != nil {
		return err
	}
	logger := slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: level}))

	if debug != "" {
		closeDebug, err := serveDebug(debug, logger)
		if err != nil {
			return err
		}
		defer closeDebug()
	}
	node, err := server.Open(ctx, config, server.Options{Logger: logger, Witness: witness})
	if err != nil {
		return fmt.Errorf("start node %s: %w", config.Name, err)
	}
	defer node.Close()
	peers := api.NewPeers(node.PeerTLS)
	defer peers.Close()
	node.SetPeers(peers)
	service, err := api.Serve(api.Config{
		Backend: node, Socket: config.API.Socket, Address: config.API.Address, Detour: config.APIDetour(), TLS: node.APITLS(), Logger: logger,
	})
	if err != nil {
		return err
	}
	defer service.Close()
	server.Notify("READY=1", "STATUS=running")
	logger.Info("node is running", "node", config.Name, "version", server.Version, "api", config.API.Socket)

	select {
	case <-ctx.Done():
		logger.Info("node stops")
		server.Notify("STOPPING=1")
		last, cancel := context.WithTimeout(context.Background(), retireMax)
		defer cancel()
		if err := node.Stopping(last); err != nil {
			logger.Warn("this stop interrupts hosts", "why", err)
		}
		node.Retire(last)
		return nil
	case err := <-node.Failed():
		server.Notify("STOPPING=1", "STATUS=failed: "+err.Error())
		return fmt.Errorf("node %s failed: %w", config.Name, err)
	}
}

// retireMax bounds what a node does for the others before it stops.
const retireMax = 20 * time.Second

// serveDebug serves profiles for measurements. It is off unless asked for.
func serveDebug(address string, logger *slog.Logger) (func(), error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			logger.Error("profiles ended", "err", err)
		}
	}()
	logger.Warn("profiles are served without authentication", "addr", l.Addr())
	return func() { s.Close(); <-done }, nil
}
